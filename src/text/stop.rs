//! Strings that end a text, wherever tokens divide them.

use std::sync::Arc;

use super::error::TextError;

/// Strings of which the first to be complete ends a text, itself left out.
///
/// Which that is does not depend on how the text is divided: the one whose last character comes
/// first, and of those that end together the longest.
///
/// ```
/// use fusedkv::text::StopStrings;
///
/// let stops = StopStrings::new(["\n\n", "END"])?;
/// let mut scan = stops.scan();
/// assert_eq!(scan.push("to be E").text, "to be ");
/// assert_eq!(scan.push("N").text, "");
/// assert_eq!(scan.push("tER E").text, "ENtER ");
/// let last = scan.push("ND of it");
/// assert_eq!((&*last.text, last.stop), ("", Some(1)));
/// # Ok::<(), fusedkv::text::TextError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStrings {
    strings: Arc<[String]>,
}

/// A text as it is looked through for [`StopStrings`].
#[derive(Clone, Debug)]
pub struct StopScan {
    stops: StopStrings,
    /// What may be the beginning of a stop string.
    held: String,
}

/// What is certain to be part of the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// The text that is certain now.
    pub text: String,
    /// Which stop string ends it, if one does.
    pub stop: Option<usize>,
}

impl StopStrings {
    /// Any number of strings.
    ///
    /// # Errors
    /// [`TextError::EmptyStopString`] if one is empty.
    pub fn new(strings: impl IntoIterator<Item = impl Into<String>>) -> Result<Self, TextError> {
        let strings: Arc<[String]> = strings.into_iter().map(Into::into).collect();
        match strings.iter().position(String::is_empty) {
            Some(index) => Err(TextError::EmptyStopString { index }),
            None => Ok(Self { strings }),
        }
    }

    /// The strings.
    pub fn strings(&self) -> &[String] {
        &self.strings
    }

    /// Begins a text.
    pub fn scan(&self) -> StopScan {
        StopScan {
            stops: self.clone(),
            held: String::new(),
        }
    }
}

impl StopScan {
    /// Takes the next piece of the text and gives what no stop string can have a part of. There is
    /// no more to come after a stop string.
    pub fn push(&mut self, piece: &str) -> Scanned {
        self.held.push_str(piece);
        let strings = self.stops.strings.iter().enumerate();
        let found = strings.filter_map(|(index, stop)| Some((index, self.held.find(stop)?)));
        let first = found.min_by_key(|&(index, start)| {
            let end = start + self.stops.strings[index].len();
            (end, start)
        });
        if let Some((index, start)) = first {
            self.held.truncate(start);
            return Scanned {
                text: std::mem::take(&mut self.held),
                stop: Some(index),
            };
        }
        let rest = self.held.split_off(self.certain());
        Scanned {
            text: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
    }

    /// What was held back, when the text ends by itself.
    pub fn finish(self) -> String {
        self.held
    }

    /// Bytes before the first place where a stop string may have begun.
    fn certain(&self) -> usize {
        let begins = |rest: &str| self.stops.strings.iter().any(|stop| stop.starts_with(rest));
        let longest = self.stops.strings.iter().map(String::len).max();
        let mut places = self.held.char_indices().map(|(place, _)| place);
        // Longer ends than any stop string need no look.
        let end = self.held.len();
        let place =
            places.find(|&place| end - place < longest.unwrap_or(0) && begins(&self.held[place..]));
        place.unwrap_or(end)
    }
}
