//! Text as its tokens arrive, for tokenizers that spell it in different ways.

use std::sync::LazyLock;

use fusedkv::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::tempdir;

use super::tokenizer;

fn from_json(json: &Value) -> Tokenizer {
    let directory = tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::load(&path).unwrap()
}

/// Pieces that are no bytes.
const PIECES: [&str; 14] = [
    "<unk>", "<s>", "</s>", "▁", "▁to", "▁be", "t", "o", "b", "e", ".", "é", "漢", "\n",
];

/// As SentencePiece's: spaces are `▁`, one is put in front, and what no piece has is bytes.
fn sentencepiece() -> Tokenizer {
    static READ: LazyLock<Tokenizer> = LazyLock::new(|| read_sentencepiece(&["<s>", "A"]));
    READ.clone()
}

/// With these tokens around the text of a prompt, `A`.
fn read_sentencepiece(prompt: &[&str]) -> Tokenizer {
    let part = |name: &&str| match *name {
        "A" => json!({"Sequence": {"id": "A", "type_id": 0}}),
        name => json!({"SpecialToken": {"id": name, "type_id": 0}}),
    };
    let single: Vec<_> = prompt.iter().map(part).collect();
    let token = |id: usize| json!({"id": PIECES[id], "ids": [id], "tokens": [PIECES[id]]});
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = PIECES.iter().map(|&piece| piece.to_owned()).chain(bytes);
    let vocab: Map<_, _> = pieces
        .zip(0..)
        .map(|(piece, id)| (piece, json!(id)))
        .collect();
    let special = |id: usize| {
        json!({"id": id, "content": PIECES[id], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    from_json(&json!({
        "version": "1.0",
        "added_tokens": [special(0), special(1), special(2)],
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": single,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": token(1), "</s>": token(2)}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": []},
    }))
}

/// As BERT's: what continues a word begins with `##`.
fn wordpiece() -> Tokenizer {
    let pieces = ["[UNK]", "to", "be", "##or", "##t", "n", ".", "'"];
    let vocab: Map<_, _> = pieces
        .iter()
        .zip(0..)
        .map(|(piece, id)| (piece.to_string(), json!(id)))
        .collect();
    from_json(&json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    }))
}

/// The pieces, of which those so far are always the beginning of `whole`.
fn streamed(tokenizer: &Tokenizer, tokens: &[u32], whole: &str) -> String {
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for &token in tokens {
        text.push_str(&stream.push(token).unwrap());
        assert!(whole.starts_with(&text), "{text:?} of {whole:?}");
    }
    text + &stream.finish().unwrap()
}

/// What tokens of [`sentencepiece`] spell, as text: runs of bytes as UTF-8, `▁` as spaces, the first
/// of which is none.
fn spelled(tokens: &[u32]) -> String {
    let mut text = String::new();
    let mut run = vec![];
    for &token in tokens {
        match (token as usize).checked_sub(PIECES.len()) {
            Some(byte) => run.push(byte as u8),
            None => {
                text.push_str(&String::from_utf8_lossy(&std::mem::take(&mut run)));
                text.push_str(&PIECES[token as usize].replace('▁', " "));
            }
        }
    }
    text.push_str(&String::from_utf8_lossy(&run));
    text.strip_prefix(' ').map(str::to_owned).unwrap_or(text)
}

/// Tokens of [`sentencepiece`], many of them bytes of characters of two to four.
fn any_pieces() -> impl Strategy<Value = Vec<u32>> {
    let byte = |byte: u8| vec![PIECES.len() as u32 + u32::from(byte)];
    let character = prop::sample::select(vec!["é", "漢", "🙂"]);
    let one = prop_oneof![
        4 => (0..PIECES.len() as u32).prop_map(|id| vec![id]),
        1 => any::<u8>().prop_map(byte),
        2 => character.prop_map(move |c| c.bytes().flat_map(byte).collect()),
    ];
    prop::collection::vec(one, 0..20).prop_map(|all| all.concat())
}

proptest! {
    #[test]
    fn any_bytes_are_streamed_as_they_are_decoded(tokens in prop::collection::vec(0u32..290, 0..40)) {
        let tokenizer = tokenizer();
        let whole = tokenizer.decode(&tokens).unwrap();
        prop_assert_eq!(streamed(&tokenizer, &tokens, &whole), whole);
    }

    #[test]
    fn text_survives_every_tokenizer(text in "([ a-z]|to|be|[\n.é漢🙂ß])*") {
        for tokenizer in [tokenizer(), sentencepiece()] {
            let tokens = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(streamed(&tokenizer, &tokens, &text), text.clone());
        }
    }

    #[test]
    fn pieces_and_bytes_are_streamed_as_what_they_spell(tokens in any_pieces()) {
        let whole = spelled(&tokens);
        prop_assert_eq!(streamed(&sentencepiece(), &tokens, &whole), whole);
    }

    #[test]
    fn words_are_streamed_as_they_are_decoded(tokens in prop::collection::vec(0u32..8, 0..20)) {
        let tokenizer = wordpiece();
        let whole = tokenizer.decode(&tokens).unwrap();
        prop_assert_eq!(streamed(&tokenizer, &tokens, &whole), whole);
    }

    /// Behind a prompt comes the text that prompt and tokens have together: with its first space.
    #[test]
    fn text_goes_on_behind_a_prompt(prompt in "(to|be|[ é.])+", tokens in any_pieces()) {
        let tokenizer = sentencepiece();
        let mut all = tokenizer.encode(&prompt).unwrap();
        let mut stream = tokenizer.stream().after(&all);
        let mut text = prompt;
        for &token in &tokens {
            text.push_str(&stream.push(token).unwrap());
        }
        text.push_str(&stream.finish().unwrap());
        all.extend(&tokens);
        prop_assert_eq!(text, spelled(&all));
    }

    #[test]
    fn special_tokens_are_no_text(tokens in any_pieces()) {
        let tokenizer = sentencepiece();
        let mut stream = tokenizer.stream().without_special();
        let mut text = String::new();
        for &token in &tokens {
            text.push_str(&stream.push(token).unwrap());
        }
        text.push_str(&stream.finish().unwrap());
        let rest: Vec<u32> = tokens.into_iter().filter(|&token| !tokenizer.is_special(token)).collect();
        prop_assert_eq!(text, spelled(&rest));
    }
}

/// A space that is a byte begins a text as any other: it is none.
#[test]
fn a_first_space_is_none_whatever_it_is_spelled_as() {
    let space = PIECES.len() as u32 + u32::from(b' ');
    for tokens in [
        vec![space],
        vec![space, space],
        vec![space, 4],
        vec![space, 6, space],
    ] {
        let whole = spelled(&tokens);
        assert_eq!(
            streamed(&sentencepiece(), &tokens, &whole),
            whole,
            "{tokens:?}"
        );
    }
}

#[test]
fn prompts_begin_as_the_tokenizer_says_and_are_not_cut() {
    let tokenizer = sentencepiece();
    let text = tokenizer.encode("t.t.t").unwrap();
    assert!(text.len() > 4, "{text:?}");
    let prompt = tokenizer.encode_prompt("t.t.t").unwrap();
    assert_eq!((prompt[0], &prompt[1..]), (1, &text[..]));
    assert_eq!(super::tokenizer().bos().unwrap(), None);
    let around: [(&[&str], _); 5] = [
        (&["<s>", "A"], Some(1)),
        (&["<s>", "A", "</s>"], Some(1)),
        (&["A"], None),
        (&["A", "</s>"], None),
        (&["<s>", "</s>", "A"], None),
    ];
    for (prompt, bos) in around {
        let tokenizer = read_sentencepiece(prompt);
        assert_eq!(tokenizer.bos().unwrap(), bos, "{prompt:?}");
    }
    assert_eq!(tokenizer.token_id("</s>"), Some(2));
    assert_eq!(tokenizer.token_id("nothing"), None);
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(3) && !tokenizer.is_special(1000));
}
