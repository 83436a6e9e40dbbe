//! Text and token files: what is read, what is held out, what is refused.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use burn_dataset::Dataset;
use fusedkv::tokenizer::{END_OF_TEXT, Tokenizer, TokenizerError};
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

/// The tokens of a file that has 2 bytes for each.
fn ids(path: &Path) -> Vec<u32> {
    let bytes = fs::read(path).unwrap();
    let pairs = bytes.chunks(2);
    pairs
        .map(|pair| u32::from(pair[0]) + 256 * u32::from(pair[1]))
        .collect()
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
fn hidden_files_and_those_a_gitignore_names_are_passed_over() {
    let directory = tempdir().unwrap();
    let path = directory.path();
    write_documents(path, &["one".to_owned(), "two".to_owned()]);
    for hidden in [".git/HEAD", ".git/objects/ab", ".hidden.txt", "a/.env"] {
        let hidden = path.join(hidden);
        fs::create_dir_all(hidden.parent().unwrap()).unwrap();
        fs::write(hidden, "hidden").unwrap();
    }
    fs::write(path.join(".gitignore"), "/out\n*.log\n").unwrap();
    fs::create_dir(path.join("out")).unwrap();
    for ignored in ["out/text.txt", "a/run.log"] {
        fs::write(path.join(ignored), "ignored").unwrap();
    }
    // What is above the folder does not matter to it.
    let folder = path.join("a");
    fs::write(path.join(".ignore"), "*").unwrap();
    fs::write(folder.join("more.txt"), "three").unwrap();
    let all = |corpus: &Corpus| {
        let [mut train, valid] = [Part::Train, Part::Valid].map(|part| documents(corpus, part));
        train.extend(valid);
        train.sort();
        train
    };
    let corpus = Corpus::open(path, 0.5).unwrap();
    assert_eq!(all(&corpus), ["one", "three", "two"]);
    assert_eq!(corpus.passed_over(), 0);
    let corpus = Corpus::open(&folder, 0.5).unwrap();
    assert_eq!(all(&corpus), ["ignored", "three", "two"]);
}

#[test]
fn a_line_that_ends_a_text_divides_a_file_into_documents() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("texts.txt");
    let end = END_OF_TEXT;
    fs::write(
        &path,
        format!("{end}\none\nlet end = \"{end}\";\n{end}\n{end}\r\ntwo\n{end}\nthree\n{end}"),
    )
    .unwrap();
    let corpus = Corpus::open(&path, 0.5).unwrap();
    let [train, valid] = [Part::Train, Part::Valid].map(|part| {
        assert!(corpus.documents(part) > 0);
        text(&corpus, part)
    });
    let mut whole = format!("{train}{valid}");
    let expected = ["one\nlet end = \"<|endoftext|>\";\n", "two\n", "three\n"];
    for document in expected {
        let ended = format!("{document}{end}");
        assert!(whole.contains(&ended), "{whole:?}");
        whole = whole.replacen(&ended, "", 1);
    }
    assert_eq!(whole, "");

    // As documents of their own they are divided alike.
    let folder = directory.path().join("folder");
    write_documents(&folder, &expected.map(str::to_owned));
    let apart = Corpus::open(&folder, 0.5).unwrap();
    let sorted = |text: String| {
        let mut documents: Vec<_> = text.split_inclusive(end).map(str::to_owned).collect();
        documents.sort();
        documents
    };
    assert_eq!(sorted(text(&apart, Part::Valid)), sorted(valid));
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
        let ids = ids(&file);
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
fn documents_end_with_a_token_that_the_tokenizer_has_or_the_caller_gives() {
    let directory = tempdir().unwrap();
    let [path, json, file] =
        ["texts.txt", "tokenizer.json", "tokens.bin"].map(|name| directory.path().join(name));
    let end = END_OF_TEXT;
    fs::write(&path, format!("one\n{end}\ntwo\n{end}\nthree\n")).unwrap();
    let corpus = Corpus::open(&path, 0.4).unwrap();
    let trained = corpus.train_tokenizer(257).unwrap();
    trained.save(&json).unwrap();
    // Spelled as Llama 2's.
    let spelled = fs::read_to_string(&json).unwrap().replace(end, "</s>");
    fs::write(&json, spelled).unwrap();
    let other = Tokenizer::load(&json).unwrap();
    assert_eq!(other.end_of_text(), None);

    let error = corpus.tokenize(Part::Train, &other, &file).unwrap_err();
    assert!(matches!(error, TrainError::NoEnd), "{error}");
    assert!(error.to_string().contains(end), "{error}");
    let outside = corpus.clone().with_end(Some(257));
    let error = outside.tokenize(Part::Train, &other, &file).unwrap_err();
    assert!(
        matches!(
            error,
            TrainError::Setting {
                field: "end",
                value: 257.0,
                ..
            }
        ),
        "{error}"
    );
    assert!(!file.exists());

    let last = other.token_id("</s>").unwrap();
    let given = corpus.with_end(Some(last));
    for part in [Part::Train, Part::Valid] {
        given.tokenize(part, &other, &file).unwrap();
        let tokens = ids(&file);
        let ends = tokens.iter().filter(|token| **token == last).count();
        assert_eq!(ends, given.documents(part));
        let text = text(&given, part).replace(end, "</s>");
        assert_eq!(other.decode(&tokens).unwrap(), text);
    }
    // What the tokenizer has comes first.
    let given = given.with_end(Some(200));
    given.tokenize(Part::Train, &trained, &file).unwrap();
    assert_eq!(ids(&file).last().copied(), trained.end_of_text());
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

#[test]
fn about_the_share_of_many_documents_is_held_out() {
    let directory = tempdir().unwrap();
    let documents: Vec<String> = (0..1000).map(|place| format!("document {place}")).collect();
    write_documents(directory.path(), &documents);
    for fraction in [0.05, 0.3, 0.8] {
        let corpus = Corpus::open(directory.path(), fraction).unwrap();
        let share = corpus.documents(Part::Valid) as f64 / 1000.0;
        // Four standard deviations of a binomial share.
        let spread = 4.0 * (fraction * (1.0 - fraction) / 1000.0).sqrt();
        assert!((share - fraction).abs() < spread, "{fraction}: {share}");
    }
    // Below any hash's share and above, one document is left.
    for (fraction, part) in [(1e-9, Part::Valid), (1.0 - 1e-9, Part::Train)] {
        let corpus = Corpus::open(directory.path(), fraction).unwrap();
        assert_eq!(corpus.documents(part), 1);
    }
}

#[test]
fn the_text_of_the_examples_is_the_one_it_always_was() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/corpus/fusedkv-0.1.txt"
    );
    assert_eq!(fs::metadata(path).unwrap().len(), 672_762);
    let corpus = Corpus::open(path, 0.05).unwrap();
    let [train, valid] = [Part::Train, Part::Valid].map(|part| corpus.documents(part));
    assert_eq!((train, valid), (94, 5));
    assert_eq!(corpus.bytes(Part::Valid), 20_129);
}

#[test]
fn threads_read_a_token_file_at_once() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("tokens.bin");
    let tokens: Vec<u32> = (0..60_000).collect();
    let file = TokenFile::write(&path, 60_000, [Ok(tokens)]).unwrap();
    let windows = TokenWindows::of_file(file, 50).unwrap();
    std::thread::scope(|scope| {
        for start in 0..4 {
            let windows = &windows;
            scope.spawn(move || {
                for place in (start..windows.len()).step_by(4) {
                    let expected: Vec<u32> = (50 * place as u32..).take(50).collect();
                    assert_eq!(windows.get(place).unwrap().inputs, expected);
                }
            });
        }
    });
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
    fn some_documents_are_held_out_and_have_no_copy_among_the_others(
        documents in prop::collection::vec("[a-z]{1,40}\n[a-z]{0,40}", 1..12),
        copies in prop::collection::vec(0usize..12, 0..6),
        fraction in 0.02f64..0.9,
    ) {
        let mut all = documents.clone();
        all.extend(copies.iter().map(|&copy| documents[copy % documents.len()].clone()));
        prop_assume!(BTreeSet::from_iter(&all).len() > 1);
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
        let held_out: usize = valid.iter().map(String::len).sum();
        prop_assert_eq!(corpus.bytes(Part::Valid), held_out as u64);

        // Other names, the same documents held out.
        let directory = tempdir().unwrap();
        all.reverse();
        write_documents(directory.path(), &all);
        let corpus = Corpus::open(directory.path(), fraction).unwrap();
        prop_assert_eq!(self::documents(&corpus, Part::Valid), valid);
    }

    #[test]
    fn documents_that_are_added_move_no_other_across(
        documents in prop::collection::vec("[a-z]{1,40}", 1..40),
        added in prop::collection::vec("[a-z]{1,400}", 1..20),
        fraction in 0.1f64..0.9,
    ) {
        let open = |documents: &[String]| {
            let directory = tempdir().unwrap();
            write_documents(directory.path(), documents);
            let corpus = Corpus::open(directory.path(), fraction).unwrap();
            [Part::Train, Part::Valid].map(|part| {
                BTreeSet::from_iter(self::documents(&corpus, part))
            })
        };
        prop_assume!(BTreeSet::from_iter(&documents).len() > 1);
        let before = open(&documents);
        // Where a part would have no document, it is given one, which others may relieve.
        prop_assume!(before.iter().all(|part| part.len() > 1));
        let after = open(&[added, documents].concat());
        for (before, after) in before.iter().zip(&after) {
            prop_assert!(before.is_subset(after));
        }
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
