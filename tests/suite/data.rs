//! Text and token files: what is read, what is held out, what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_dataset::Dataset;
use fusedkv::tokenizer::{END_OF_TEXT, TokenizerError};
use fusedkv::train::{Corpus, Part, TokenFile, TokenWindows, TrainError, Windows};
use proptest::prelude::*;
use tempfile::tempdir;

fn text(corpus: &Corpus, part: Part) -> String {
    corpus.text(part).collect::<Result<_, _>>().unwrap()
}

/// The documents of a part, sorted.
fn documents(corpus: &Corpus, part: Part) -> Vec<String> {
    let text = text(corpus, part);
    let mut documents: Vec<String> = text.split_terminator(END_OF_TEXT).map(Into::into).collect();
    assert_eq!(documents.len(), corpus.documents(part));
    documents.sort();
    documents
}

fn write_documents(directory: &Path, documents: &[String]) {
    for (place, document) in documents.iter().enumerate() {
        let folder = directory.join(["", "a", "a/b"][place % 3]);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{place}.txt")), document).unwrap();
    }
}

#[test]
fn other_files_are_passed_over_and_no_text_is_an_error() {
    let directory = tempdir().unwrap();
    let path = directory.path();
    let error = Corpus::open(path, 0.5).unwrap_err();
    assert!(matches!(error, TrainError::NoText(_)), "{error}");
    fs::write(path.join("empty.txt"), "").unwrap();
    fs::write(path.join("picture.png"), [0x89, b'P', 0xff]).unwrap();
    let error = Corpus::open(path, 0.5).unwrap_err();
    assert!(matches!(error, TrainError::NoText(_)), "{error}");
    fs::write(path.join("b.txt"), "b").unwrap();
    fs::write(path.join("a.txt"), "a").unwrap();
    let corpus = Corpus::open(path, 0.5).unwrap();
    assert_eq!(corpus.passed_over(), 2);
    assert_eq!(corpus.bytes(Part::Train), 1);
    assert_eq!(corpus.bytes(Part::Valid), 1);

    for path in [path.join("picture.png"), path.join("none.txt")] {
        let error = Corpus::open(path, 0.5).unwrap_err();
        assert!(matches!(error, TrainError::Unreadable { .. }), "{error}");
    }
    for fraction in [0.0, 1.0, f64::NAN] {
        let error = Corpus::open(path, fraction).unwrap_err();
        assert!(
            matches!(
                error,
                TrainError::Setting {
                    field: "valid_fraction",
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn long_texts_are_read_in_pieces() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("long.txt");
    let line = "eine Zeile für sich, 漢字 🙂\n";
    let long = line.repeat((5 << 20) / line.len());
    fs::write(&path, &long).unwrap();
    let corpus = Corpus::open(&path, 0.4).unwrap();
    let mut all = String::new();
    for part in [Part::Train, Part::Valid] {
        for piece in corpus.text(part) {
            let piece = piece.unwrap();
            assert!(piece.len() <= (1 << 20) + line.len());
            assert!(piece.ends_with('\n') || piece == END_OF_TEXT);
            all.push_str(piece.trim_end_matches(END_OF_TEXT));
        }
    }
    assert!(all == long);
}

#[test]
fn the_tokens_of_a_corpus_are_its_text_and_the_tokenizer_sees_no_held_out_text() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("text.txt");
    fs::write(&path, "the hat\nthe cat\nthe bat\nzyzzyzyzzyzyzzyz\n").unwrap();
    let corpus = Corpus::open(&path, 0.4).unwrap();
    assert_eq!(
        text(&corpus, Part::Valid),
        format!("zyzzyzyzzyzyzzyz\n{END_OF_TEXT}")
    );
    let tokenizer = corpus.train_tokenizer(270).unwrap();
    assert!(tokenizer.encode("the").unwrap().len() < 3);
    assert_eq!(tokenizer.encode("zyz").unwrap().len(), 3);
    for part in [Part::Train, Part::Valid] {
        let file = directory.path().join("tokens.bin");
        let tokens = corpus.tokenize(part, &tokenizer, &file).unwrap();
        let ids: Vec<u32> = fs::read(&file)
            .unwrap()
            .chunks(2)
            .map(|pair| u32::from(pair[0]) + 256 * u32::from(pair[1]))
            .collect();
        assert_eq!(tokens.len(), ids.len());
        assert_eq!(tokenizer.decode(&ids).unwrap(), text(&corpus, part));
    }
    let error = corpus.train_tokenizer(256).unwrap_err();
    assert!(
        matches!(
            error,
            TrainError::Tokenizer(TokenizerError::VocabTooSmall { found: 256, .. })
        ),
        "{error}"
    );
    fs::remove_file(&path).unwrap();
    let tokens = directory.path().join("other.bin");
    for error in [
        corpus.train_tokenizer(270).unwrap_err(),
        corpus
            .tokenize(Part::Train, &tokenizer, &tokens)
            .unwrap_err(),
    ] {
        assert!(matches!(error, TrainError::Unreadable { .. }), "{error}");
    }
    assert!(!tokens.exists());
}

#[test]
fn token_files_that_are_not_are_refused() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("tokens.bin");
    let error = TokenFile::open(&path, 100).unwrap_err();
    assert!(matches!(error, TrainError::Unreadable { .. }), "{error}");
    fs::write(&path, [1, 0, 2]).unwrap();
    let error = TokenFile::open(&path, 100).unwrap_err();
    assert!(matches!(error, TrainError::Unreadable { .. }), "{error}");
    fs::write(&path, [1, 0, 2, 1, 3, 0]).unwrap();
    let error = TokenFile::open(&path, 258).unwrap_err();
    assert!(
        matches!(
            error,
            TrainError::OutOfVocabulary {
                position: 1,
                token: 258,
                vocab_size: 258
            }
        ),
        "{error}"
    );
    let file = TokenFile::open(&path, 259).unwrap();
    for (context, windows) in [(2, 1), (3, 0), (0, 0)] {
        match TokenWindows::of_file(file.clone(), context) {
            Ok(cut) => assert_eq!(cut.len(), windows),
            Err(TrainError::TooFewTokens {
                found: 3,
                windows: 1,
                context: 3,
            }) => {}
            Err(TrainError::Setting {
                field: "context", ..
            }) if context == 0 => {}
            Err(error) => panic!("{error}"),
        }
    }
    // A part that fails leaves the file as it was, and nothing beside it.
    let parts = [
        Ok(vec![1]),
        Err(TrainError::NoText(path.clone())),
        Ok(vec![2]),
    ];
    let error = TokenFile::write(&path, 259, parts).unwrap_err();
    assert!(matches!(error, TrainError::NoText(_)), "{error}");
    assert_eq!(fs::read(&path).unwrap(), [1, 0, 2, 1, 3, 0]);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    let nowhere = directory.path().join("no/such/tokens.bin");
    let error = TokenFile::write(nowhere, 259, [Ok(vec![1])]).unwrap_err();
    assert!(matches!(error, TrainError::Write { .. }), "{error}");
}

proptest! {
    #[test]
    fn windows_of_a_file_are_those_of_its_tokens(
        tokens in prop::collection::vec(0u32..70_000, 2..300),
        context in 1usize..20,
        parts in 1usize..9,
        small in any::<bool>(),
    ) {
        let vocab_size = if small { 1 << 16 } else { 70_000 };
        let tokens: Vec<u32> = tokens.into_iter().map(|t| t % vocab_size as u32).collect();
        prop_assume!(tokens.len() > context);
        let directory = tempdir().unwrap();
        let path = directory.path().join("tokens.bin");
        let chunks = tokens.chunks(parts).map(|part| Ok(part.to_vec()));
        let file = TokenFile::write(&path, vocab_size, chunks).unwrap();
        let width = if small { 2 } else { 4 };
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()[..width].to_vec()).collect();
        prop_assert_eq!(fs::read(&path).unwrap(), bytes);

        let windows = TokenWindows::of_file(file, context).unwrap();
        prop_assert_eq!(windows.len(), (tokens.len() - 1) / context);
        for (window, start) in windows.iter().zip((0..).step_by(context)) {
            prop_assert_eq!(&window.inputs, &tokens[start..start + context]);
            prop_assert_eq!(&window.targets, &tokens[start + 1..=start + context]);
        }
        let largest = *tokens.iter().max().unwrap() as usize;
        prop_assert!(windows.check_vocabulary(largest + 1).is_ok());
        let refused = matches!(
            windows.check_vocabulary(largest),
            Err(TrainError::OutOfVocabulary { position, token, .. })
                if tokens[position] == token && token as usize == largest
        );
        prop_assert!(refused);
    }

    #[test]
    fn held_out_documents_are_about_the_share_and_have_no_copy_among_the_others(
        documents in prop::collection::vec("[a-z]{1,40}\n[a-z]{0,40}", 1..12),
        copies in prop::collection::vec(0usize..12, 0..6),
        fraction in 0.02f64..0.9,
    ) {
        let mut all = documents.clone();
        all.extend(copies.iter().map(|&copy| documents[copy % documents.len()].clone()));
        let mut groups: BTreeMap<&str, usize> = BTreeMap::new();
        for document in &all {
            *groups.entry(document).or_default() += document.len();
        }
        prop_assume!(groups.len() > 1);
        let directory = tempdir().unwrap();
        write_documents(directory.path(), &all);
        let corpus = Corpus::open(directory.path(), fraction).unwrap();
        let [train, valid] = [Part::Train, Part::Valid].map(|part| self::documents(&corpus, part));

        prop_assert!(!train.is_empty() && !valid.is_empty());
        prop_assert!(valid.iter().all(|document| !train.contains(document)));
        let mut both = [train, valid.clone()].concat();
        both.sort();
        let mut expected = all.clone();
        expected.sort();
        prop_assert_eq!(both, expected);
        let total: usize = groups.values().sum();
        let allowed = (total as f64 * fraction).max(*groups.values().min().unwrap() as f64);
        let held_out: usize = valid.iter().map(String::len).sum();
        prop_assert_eq!(corpus.bytes(Part::Valid), held_out as u64);
        prop_assert!(held_out as f64 <= allowed);

        // Other names, the same documents held out.
        let directory = tempdir().unwrap();
        all.reverse();
        write_documents(directory.path(), &all);
        let corpus = Corpus::open(directory.path(), fraction).unwrap();
        prop_assert_eq!(self::documents(&corpus, Part::Valid), valid);
    }

    #[test]
    fn the_end_of_a_single_text_is_held_out_at_a_line(
        lines in prop::collection::vec("[a-zé漢]{0,12}", 1..20),
        fraction in 0.02f64..0.9,
    ) {
        let whole = lines.join("\n");
        prop_assume!(whole.chars().count() > 1);
        let directory = tempdir().unwrap();
        let path = directory.path().join("text.txt");
        fs::write(&path, &whole).unwrap();
        let corpus = Corpus::open(&path, fraction).unwrap();
        let [train, valid] = [Part::Train, Part::Valid]
            .map(|part| text(&corpus, part).replace(END_OF_TEXT, ""));
        prop_assert_eq!(format!("{train}{valid}"), whole.clone());
        prop_assert!(!valid.is_empty());
        prop_assert!(valid.len() >= (whole.len() as f64 * fraction) as usize);
        let first_line_is_longer = !train.contains('\n');
        prop_assert!(train.ends_with('\n') || first_line_is_longer);
    }
}
