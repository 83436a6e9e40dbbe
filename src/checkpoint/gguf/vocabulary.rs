//! `tokenizer.json` and `tokenizer_config.json` from a file's vocabulary.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::architectures::Family;
use super::error::GgufError;
use super::keys::Keys;
use super::model::Model;
use super::pre_tokenizer::PreTokenizer;

/// What stands for a space in SentencePiece's tokens.
const SPACE: &str = "\u{2581}";

/// Texts that end an answer in chat templates, by which llama.cpp finds such tokens, too.
const ENDS_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"];

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Normal,
    Unknown,
    Control,
    /// Found in texts before anything is merged.
    UserDefined,
    Unused,
    Byte,
}

/// A file's tokens.
#[derive(Debug)]
pub(super) struct Vocabulary<'f> {
    keys: Keys<'f>,
    family: Family,
    tokens: &'f [String],
    uses: Vec<Use>,
    kind: Kind,
    add_bos: bool,
    add_eos: bool,
}

/// How texts become tokens.
#[derive(Debug)]
enum Kind {
    /// Pairs of bytes, spelled as GPT-2 does.
    Bytes(&'static PreTokenizer),
    /// SentencePiece's pairs of characters, bytes where there is none.
    SentencePiece { add_space: bool },
}

impl<'f> Vocabulary<'f> {
    /// The vocabulary, if the file has one.
    pub fn of(keys: Keys<'f>, model: &Model) -> Result<Option<Self>, GgufError> {
        let kind = match keys.text("tokenizer.ggml.model")? {
            None | Some("no_vocab" | "none") => return Ok(None),
            Some("gpt2") => {
                let key = "tokenizer.ggml.pre";
                let rule = PreTokenizer::of(keys.text(key)?.unwrap_or("default"));
                Kind::Bytes(rule.ok_or_else(|| keys.wrong(key, PreTokenizer::known()))?)
            }
            Some("llama") => Kind::SentencePiece {
                add_space: keys
                    .flag("tokenizer.ggml.add_space_prefix")?
                    .unwrap_or(true),
            },
            Some(_) => return Err(keys.wrong("tokenizer.ggml.model", "gpt2 or llama")),
        };
        let key = "tokenizer.ggml.tokens";
        let tokens = keys.texts(key)?.filter(|tokens| !tokens.is_empty());
        let tokens = tokens.ok_or_else(|| keys.wrong(key, "a list of texts"))?;
        if tokens.len() > model.vocab_size {
            let expected = format!("at most {}, as the embedding has", model.vocab_size);
            return Err(keys.wrong(key, expected));
        }
        let add_bos = match kind {
            Kind::Bytes(rule) => rule.add_bos,
            Kind::SentencePiece { .. } => true,
        };
        let vocabulary = Self {
            keys,
            family: model.family,
            tokens,
            uses: uses(&keys, tokens.len())?,
            kind,
            add_bos: keys
                .flag("tokenizer.ggml.add_bos_token")?
                .unwrap_or(add_bos),
            add_eos: keys.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        };
        Ok(Some(vocabulary))
    }

    /// A token that a key names.
    fn special(&self, name: &str) -> Result<Option<(u32, &'f str)>, GgufError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match self.keys.token(&key)? {
            None => Ok(None),
            Some(id) => match self.tokens.get(id as usize) {
                Some(token) => Ok(Some((id, token))),
                None => Err(self
                    .keys
                    .wrong(&key, format!("below {}", self.tokens.len()))),
            },
        }
    }

    /// The tokens that end a text: those the file says, and the one that ends a turn of its template.
    pub fn ends(&self) -> Result<Vec<u32>, GgufError> {
        let mut ends = Vec::new();
        for name in ["eos", "eot", "eom"] {
            ends.extend(self.special(name)?.map(|(id, _)| id));
        }
        let template = self
            .keys
            .text("tokenizer.chat_template")?
            .unwrap_or_default();
        let of_turn = self
            .added()
            .filter(|&(_, token, _)| ENDS_OF_TURN.contains(&token) && template.contains(token));
        ends.extend(of_turn.map(|(id, _, _)| id));
        let mut kept = Vec::new();
        for id in ends {
            if !kept.contains(&id) {
                kept.push(id);
            }
        }
        Ok(kept)
    }

    /// `tokenizer_config.json`.
    pub fn config(&self) -> Result<Value, GgufError> {
        let mut json = Map::new();
        json.insert("add_bos_token".to_owned(), json!(self.add_bos));
        json.insert("add_eos_token".to_owned(), json!(self.add_eos));
        json.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        for (name, key) in [
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        ] {
            if let Some((_, token)) = self.special(key)? {
                json.insert(format!("{name}_token"), json!(token));
            }
        }
        if let Some(template) = self.keys.text("tokenizer.chat_template")? {
            json.insert("chat_template".to_owned(), json!(template));
        }
        json.insert(
            "tokenizer_class".to_owned(),
            json!("PreTrainedTokenizerFast"),
        );
        Ok(Value::Object(json))
    }

    /// `tokenizer.json`.
    pub fn json(&self) -> Result<Value, GgufError> {
        let (normalizer, pre_tokenizer, decoder) = match &self.kind {
            Kind::Bytes(rule) => (
                match rule.composed {
                    true => json!({ "type": "NFC" }),
                    false => Value::Null,
                },
                rule.json(),
                json!({
                    "type": "ByteLevel",
                    "add_prefix_space": true,
                    "trim_offsets": true,
                    "use_regex": true,
                }),
            ),
            Kind::SentencePiece { add_space } => {
                (spaces(*add_space), Value::Null, bytes(*add_space))
            }
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens()?,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor()?,
            "decoder": decoder,
            "model": self.model()?,
        }))
    }

    /// Tokens that are found in a text before all else; and whether each is special, which decoding
    /// may leave out.
    fn added(&self) -> impl Iterator<Item = (u32, &'f str, bool)> {
        let tokens = (0..).zip(self.tokens.iter().zip(&self.uses));
        tokens.filter_map(|(id, (token, what))| match what {
            Use::Control | Use::Unknown => Some((id, &**token, true)),
            // Spaces are merged like others.
            Use::UserDefined if self.spelled(token) == *token => Some((id, &**token, false)),
            _ => None,
        })
    }

    fn added_tokens(&self) -> Result<Vec<Value>, GgufError> {
        let mut added: BTreeMap<u32, (&str, bool)> = self
            .added()
            .map(|(id, token, special)| (id, (token, special)))
            .collect();
        for name in ["bos", "eos", "eot", "unknown", "padding"] {
            if let Some((id, token)) = self.special(name)? {
                added.insert(id, (token, true));
            }
        }
        let token = |(id, (content, special)): (u32, (&str, bool))| {
            json!({
                "id": id,
                "content": content,
                "single_word": false,
                "lstrip": false,
                "rstrip": special && self.takes_spaces(content),
                "normalized": false,
                "special": special,
            })
        };
        Ok(added.into_iter().map(token).collect())
    }

    /// Whether a special token takes the spaces after it, as Phi-3's of a chat do.
    fn takes_spaces(&self, token: &str) -> bool {
        let plain = ["<unk>", "<s>", "<|endoftext|>"];
        self.family == Family::Phi3
            && matches!(self.kind, Kind::SentencePiece { .. })
            && !plain.contains(&token)
    }

    /// A token as `tokenizer.json` has it: SentencePiece's runs of spaces are written out in files.
    fn spelled(&self, token: &str) -> String {
        let is_space = !token.is_empty() && token.bytes().all(|byte| byte == b' ');
        match self.kind {
            Kind::SentencePiece { .. } if is_space => token.replace(' ', SPACE),
            _ => token.to_owned(),
        }
    }

    fn model(&self) -> Result<Value, GgufError> {
        let mut ids = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            ids.insert(self.spelled(token), json!(id));
        }
        let sentence_piece = matches!(self.kind, Kind::SentencePiece { .. });
        let unknown = match self.special("unknown")? {
            Some((_, token)) if sentence_piece => Some(token),
            None if sentence_piece && ids.contains_key("<unk>") => Some("<unk>"),
            _ => None,
        };
        let ignore_merges = match self.kind {
            Kind::Bytes(rule) => rule.ignore_merges,
            Kind::SentencePiece { .. } => false,
        };
        Ok(json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": sentence_piece,
            "byte_fallback": sentence_piece,
            "ignore_merges": ignore_merges,
            "merges": self.merges()?,
            "vocab": ids,
        }))
    }

    fn merges(&self) -> Result<Vec<[String; 2]>, GgufError> {
        let key = "tokenizer.ggml.merges";
        let Some(merges) = self.keys.texts(key)? else {
            return match self.kind {
                Kind::Bytes(_) => Err(self.keys.wrong(key, "a list of pairs")),
                Kind::SentencePiece { .. } => self.merges_by_score(),
            };
        };
        let pair = |merge: &String| {
            // Either part may begin with a space of its own.
            let first = merge.chars().next()?.len_utf8();
            let space = merge[first..].find(' ')? + first;
            Some([&merge[..space], &merge[space + 1..]].map(str::to_owned))
        };
        let wrong = |merge: &String| GgufError::Tokenizer {
            path: self.keys.file.path().to_owned(),
            reason: format!("`{key}` has {merge:?}, expected two parts with a space between"),
        };
        let pairs = merges
            .iter()
            .map(|merge| pair(merge).ok_or_else(|| wrong(merge)));
        pairs.collect()
    }

    /// SentencePiece merges what makes the token of the highest score; here every way to make a
    /// token is a pair, in that order.
    fn merges_by_score(&self) -> Result<Vec<[String; 2]>, GgufError> {
        let key = "tokenizer.ggml.scores";
        let scores = self.keys.numbers(key)?.unwrap_or_default();
        if scores.len() != self.tokens.len() {
            let expected = format!("{} numbers, one per token", self.tokens.len());
            return Err(self.keys.wrong(key, expected));
        }
        let is_gemma = matches!(self.family, Family::Gemma2 | Family::Gemma3);
        let mergeable = |what: &Use| matches!(what, Use::Normal | Use::UserDefined);
        let tokens: Vec<String> = self
            .tokens
            .iter()
            .map(|token| self.spelled(token))
            .collect();
        let scored: BTreeMap<&str, (usize, f64)> = tokens
            .iter()
            .zip(&self.uses)
            .zip(&scores)
            .enumerate()
            .filter(|(_, ((_, what), _))| mergeable(what))
            .map(|(id, ((token, _), &score))| {
                // Gemma's order is that of its tokens, whose scores do not follow it.
                let score = if is_gemma { -(id as f64) } else { score };
                (&**token, (id, score))
            })
            .collect();
        let mut pairs = Vec::new();
        for (token, &(_, score)) in &scored {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&(l, _)), Some(&(r, _))) = (scored.get(left), scored.get(right)) {
                    let lengths = (left.chars().count(), right.chars().count());
                    pairs.push((score, lengths, (l, r), [left, right]));
                }
            }
        }
        pairs.sort_by(|a, b| {
            let by_score = b.0.total_cmp(&a.0);
            by_score.then(b.1.cmp(&a.1)).then(a.2.cmp(&b.2))
        });
        Ok(pairs
            .into_iter()
            .map(|(_, _, _, pair)| pair.map(str::to_owned))
            .collect())
    }

    /// What is put around a text.
    fn post_processor(&self) -> Result<Value, GgufError> {
        let around = |name: &str, wanted: bool| match self.special(name)? {
            Some(token) if wanted => Ok::<_, GgufError>(Some(token)),
            _ => Ok(None),
        };
        let (bos, eos) = (around("bos", self.add_bos)?, around("eos", self.add_eos)?);
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let text = |text: &str, kind: u8| {
            let special = |token: Option<(u32, &str)>| {
                token.map(|(_, token)| json!({ "SpecialToken": { "id": token, "type_id": kind } }))
            };
            let sequence = json!({ "Sequence": { "id": text, "type_id": kind } });
            let parts = special(bos)
                .into_iter()
                .chain([sequence])
                .chain(special(eos));
            parts.collect::<Vec<_>>()
        };
        let mut tokens = Map::new();
        for (id, token) in [bos, eos].into_iter().flatten() {
            let entry = json!({ "id": token, "ids": [id], "tokens": [token] });
            tokens.insert(token.to_owned(), entry);
        }
        Ok(json!({
            "type": "TemplateProcessing",
            "single": text("A", 0),
            "pair": ([text("A", 0), text("B", 1)].concat()),
            "special_tokens": tokens,
        }))
    }
}

/// What each token is for; normal where the file does not say.
fn uses(keys: &Keys, tokens: usize) -> Result<Vec<Use>, GgufError> {
    let key = "tokenizer.ggml.token_type";
    let Some(types) = keys.numbers(key)? else {
        return Ok(vec![Use::Normal; tokens]);
    };
    let what = |&kind: &f64| {
        Some(match kind as i64 {
            // Some converters write 0 for what is not said.
            0 | 1 => Use::Normal,
            2 => Use::Unknown,
            3 => Use::Control,
            4 => Use::UserDefined,
            5 => Use::Unused,
            6 => Use::Byte,
            _ => return None,
        })
    };
    let uses: Option<Vec<Use>> = types.iter().map(what).collect();
    let uses = uses.filter(|uses| uses.len() == tokens);
    uses.ok_or_else(|| keys.wrong(key, format!("{tokens} numbers from 1 to 6")))
}

/// SentencePiece's spelling of spaces.
fn spaces(add_space: bool) -> Value {
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    match add_space {
        true => json!({
            "type": "Sequence",
            "normalizers": [{ "type": "Prepend", "prepend": SPACE }, replace],
        }),
        false => replace,
    }
}

/// From SentencePiece's tokens to text.
fn bytes(add_space: bool) -> Value {
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if add_space {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": decoders })
}
