//! How texts are cut before pairs are merged: files have a name for it, `tokenizer.json` the rule.

use serde_json::{Value, json};

/// A rule by the names that files have for it.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// `tokenizer.ggml.pre`.
    pub names: &'static [&'static str],
    cut: Cut,
    /// Whether texts are composed first (Unicode's NFC).
    pub composed: bool,
    /// Whether a piece that is a token is taken without merging.
    pub ignore_merges: bool,
    /// Whether a text begins with a token of its own where the file does not say.
    pub add_bos: bool,
}

#[derive(Debug)]
enum Cut {
    /// GPT-2's expression, which byte-level tokenizers have built in.
    Gpt2,
    /// Each digit by itself, then GPT-2's.
    DigitsGpt2,
    Expression(&'static str),
}

// The expressions of the models' own tokenizer.json.

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The rules that are known.
static PRE_TOKENIZERS: [PreTokenizer; 7] = [
    rule(&["default", "gpt-2", "phi-2", "mpt", "olmo"], Cut::Gpt2),
    rule(
        &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        Cut::DigitsGpt2,
    ),
    PreTokenizer {
        ignore_merges: true,
        add_bos: true,
        ..rule(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
            Cut::Expression(LLAMA3),
        )
    },
    rule(&["dbrx", "smaug-bpe"], Cut::Expression(LLAMA3)),
    PreTokenizer {
        composed: true,
        ..rule(
            &["qwen2", "deepseek-r1-qwen", "megrez"],
            Cut::Expression(QWEN2),
        )
    },
    PreTokenizer {
        ignore_merges: true,
        add_bos: true,
        ..rule(&["tekken"], Cut::Expression(TEKKEN))
    },
    rule(&["gpt-4o", "llama4"], Cut::Expression(GPT4O)),
];

const fn rule(names: &'static [&'static str], cut: Cut) -> PreTokenizer {
    PreTokenizer {
        names,
        cut,
        composed: false,
        ignore_merges: false,
        add_bos: false,
    }
}

impl PreTokenizer {
    pub fn of(name: &str) -> Option<&'static Self> {
        PRE_TOKENIZERS
            .iter()
            .find(|rule| rule.names.contains(&name))
    }

    /// The names that are known.
    pub fn known() -> String {
        let names: Vec<_> = PRE_TOKENIZERS
            .iter()
            .flat_map(|rule| rule.names.iter().copied())
            .collect();
        names.join(", ")
    }

    /// `pre_tokenizer` of a tokenizer.json.
    pub fn json(&self) -> Value {
        let bytes = |use_regex: bool| {
            json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": true,
                "use_regex": use_regex,
            })
        };
        let first = match self.cut {
            Cut::Gpt2 => return bytes(true),
            Cut::DigitsGpt2 => {
                let digits = json!({ "type": "Digits", "individual_digits": true });
                return json!({ "type": "Sequence", "pretokenizers": [digits, bytes(true)] });
            }
            Cut::Expression(expression) => json!({
                "type": "Split",
                "pattern": { "Regex": expression },
                "behavior": "Isolated",
                "invert": false,
            }),
        };
        json!({ "type": "Sequence", "pretokenizers": [first, bytes(false)] })
    }
}
