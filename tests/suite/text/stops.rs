//! Stop strings, wherever a text is divided.

use fusedkv::text::{StopStrings, TextError};
use proptest::prelude::*;

/// The text before the stop string that is complete first, of several the longest, and which it is.
fn plain(text: &str, stops: &[String]) -> (String, Option<usize>) {
    for end in 0..=text.len() {
        let Some(read) = text.get(..end) else {
            continue;
        };
        let ending = (0..stops.len()).filter(|&i| read.ends_with(&stops[i]));
        if let Some(longest) = ending.rev().max_by_key(|&i| stops[i].len()) {
            let len = end - stops[longest].len();
            return (text[..len].to_owned(), Some(longest));
        }
    }
    (text.to_owned(), None)
}

/// Pieces of any length, none included.
fn any_pieces() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[ab\né🙂]{0,4}", 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn stop_strings_end_a_text_however_it_is_divided(
        pieces in any_pieces(),
        stops in prop::collection::vec("[ab\né🙂]{1,4}", 0..4),
    ) {
        let whole = pieces.concat();
        let (expected, stop) = plain(&whole, &stops);
        let mut scan = StopStrings::new(stops).unwrap().scan();
        let (mut text, mut found) = (String::new(), None);
        for piece in &pieces {
            let scanned = scan.push(piece);
            text.push_str(&scanned.text);
            // What has been given is never taken back.
            prop_assert!(expected.starts_with(&text), "{:?} of {:?}", text, expected);
            found = scanned.stop;
            if found.is_some() {
                break;
            }
        }
        if found.is_none() {
            text.push_str(&scan.finish());
        }
        // Equal strings are the first of them.
        prop_assert_eq!((text, found), (expected, stop));
    }

    /// Nothing is held back that cannot become a stop string.
    #[test]
    fn no_more_is_held_back_than_need_be(pieces in any_pieces(), stop in "[ab\né🙂]{1,4}") {
        let mut scan = StopStrings::new([stop.clone()]).unwrap().scan();
        let mut held = String::new();
        for piece in &pieces {
            held.push_str(piece);
            let scanned = scan.push(piece);
            if scanned.stop.is_some() {
                break;
            }
            held = held.split_off(scanned.text.len());
            prop_assert!(held.len() < stop.len() && stop.starts_with(&held), "{:?} of {:?}", held, stop);
        }
    }
}

#[test]
fn empty_stop_strings_are_refused() {
    let error = StopStrings::new(["a", ""]).unwrap_err();
    assert!(
        matches!(error, TextError::EmptyStopString { index: 1 }),
        "{error}"
    );
}
