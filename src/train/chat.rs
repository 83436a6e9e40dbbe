//! Chats to fine-tune on, of which the answers count.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use burn_dataset::Dataset;
use serde::Deserialize;
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3Default;

use super::data::{Answer, TokenWindow, Windows, check_fraction, check_vocabulary};
use super::error::TrainError;
use crate::text::{AnsweredText, ChatError, ChatMessage, ChatOptions, ChatTemplate};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Chats as windows, one behind the other in none: a window begins with its chat, as the model's own
/// template writes it, and only the answers' tokens count. What is behind the chat is padding, which
/// nothing before it sees.
///
/// A clone shares the tokens.
#[derive(Clone, Debug)]
pub struct ChatWindows {
    chats: Arc<[Chat]>,
    windows: Range<usize>,
    context: usize,
}

/// A text of a chat.
#[derive(Clone, Debug)]
struct Chat {
    /// The line of its file, counted from 1.
    line: usize,
    tokens: Vec<u32>,
    /// The tokens that an assistant writes.
    answers: Vec<Range<usize>>,
}

/// A line of a file of chats that is none to learn from.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChatDataError {
    /// Not an object as expected.
    #[error(
        "{0}, expected a JSON object {{\"messages\": [{{\"role\": \"user\", \"content\": …}}, …]}}"
    )]
    Json(String),
    /// What the template cannot write, or has no answer: without messages, of a role it does not know.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// More than a window.
    #[error(
        "the chat has {tokens} tokens, expected at most {}: the context, {context}, and one more",
        context + 1
    )]
    TooLong {
        /// Tokens up to the end of its last answer.
        tokens: usize,
        /// Tokens per window.
        context: usize,
    },
    /// The tokenizer refuses the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A line of a file.
#[derive(Deserialize)]
struct Line {
    messages: Vec<ChatMessage>,
    #[serde(default)]
    tools: Option<serde_json::Value>,
}

impl ChatWindows {
    /// Reads a file with a chat on every line, `{"messages": [{"role": …, "content": …}, …]}` and
    /// perhaps `"tools"`; lines of white space are passed over.
    ///
    /// A chat is rendered by [`ChatTemplate::answers`], which gives mostly one text, and a window each.
    /// A token counts if it lies in an answer, the mark that ends it included and white space behind
    /// that left out: what the model is to write.
    ///
    /// ```
    /// use fusedkv::text::{ChatOptions, ChatTemplate};
    /// use fusedkv::tokenizer::Tokenizer;
    /// use fusedkv::train::{ChatWindows, Windows};
    ///
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("chats.jsonl");
    /// let chat = r#"{"messages": [{"role": "user", "content": "1 + 1?"},
    ///     {"role": "assistant", "content": "2"}]}"#.replace('\n', "");
    /// std::fs::write(&path, chat)?;
    /// let tokenizer = Tokenizer::train_bpe("", 257)?; // a token per byte
    /// let template = ChatTemplate::new(
    ///     "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}<|endoftext|>{% endfor %}\
    ///      {% if add_generation_prompt %}a: {% endif %}",
    /// );
    /// let windows = ChatWindows::read(&path, &tokenizer, &template, &ChatOptions::new(), 32)?;
    /// assert_eq!(windows.counted(), 2); // "2" and the end of the text
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`TrainError::Chat`] for the first line that is none of such chats; [`TrainError::Unreadable`];
    /// [`TrainError::NoText`] for a file without any; [`TrainError::Setting`] if `context` is 0.
    pub fn read(
        path: impl AsRef<Path>,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        options: &ChatOptions,
        context: usize,
    ) -> Result<Self, TrainError> {
        let path = path.as_ref();
        if context == 0 {
            return Err(TrainError::Setting {
                field: "context",
                value: 0.0,
                expected: "1 or more",
            });
        }
        let unreadable = |error: std::io::Error| TrainError::Unreadable {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        // What a template writes of the date is the same for all.
        let options = options.clone().at_one_time();
        let mut chats = Vec::new();
        let lines = BufReader::new(File::open(path).map_err(unreadable)?).lines();
        for (line, json) in (1..).zip(lines) {
            let json = json.map_err(unreadable)?;
            if json.trim().is_empty() {
                continue;
            }
            let texts = rendered(&json, template, &options);
            let of_line = texts.and_then(|texts| {
                let chat = |text| Chat::new(line, &text, tokenizer, context);
                texts.into_iter().map(chat).collect::<Result<Vec<_>, _>>()
            });
            chats.extend(of_line.map_err(|source| TrainError::Chat {
                path: path.to_owned(),
                line,
                source,
            })?);
        }
        if chats.is_empty() {
            return Err(TrainError::NoText(path.to_owned()));
        }
        Ok(Self {
            windows: 0..chats.len(),
            chats: chats.into(),
            context,
        })
    }

    /// The same in windows no longer than the longest chat needs.
    #[must_use]
    pub fn fitted(self) -> Self {
        Self {
            context: self.longest().saturating_sub(1).max(1),
            ..self
        }
    }

    /// Holds out the chats of the last `valid_fraction` of the lines for validation, at least one and
    /// never all: `(train, valid)`.
    ///
    /// # Errors
    /// [`TrainError::Setting`] if the fraction is not between 0 and 1, or there is one chat alone.
    pub fn split(self, valid_fraction: f64) -> Result<(Self, Self), TrainError> {
        check_fraction(valid_fraction)?;
        let mut starts: Vec<usize> = Vec::new();
        for index in self.windows.clone() {
            let last = starts.last();
            if last.is_none_or(|&last| self.chats[last].line != self.chats[index].line) {
                starts.push(index);
            }
        }
        let lines = starts.len();
        if lines < 2 {
            return Err(TrainError::Setting {
                field: "chats",
                value: lines as f64,
                expected: "2 or more, of which one is held out",
            });
        }
        let valid = ((lines as f64 * valid_fraction).round() as usize).clamp(1, lines - 1);
        let first_valid = starts[lines - valid];
        let part = |windows| Self {
            windows,
            ..self.clone()
        };
        let Range { start, end } = self.windows;
        Ok((part(start..first_valid), part(first_valid..end)))
    }

    /// Targets that count, in all windows.
    pub fn counted(&self) -> usize {
        let answers = self.chats().iter().flat_map(|chat| &chat.answers);
        answers.map(Range::len).sum()
    }

    /// Tokens of the longest chat.
    pub fn longest(&self) -> usize {
        let lens = self.chats().iter().map(|chat| chat.tokens.len());
        lens.max().unwrap_or(0)
    }

    fn chats(&self) -> &[Chat] {
        &self.chats[self.windows.clone()]
    }
}

fn rendered(
    json: &str,
    template: &ChatTemplate,
    options: &ChatOptions,
) -> Result<Vec<AnsweredText>, ChatDataError> {
    let line: Line =
        serde_json::from_str(json).map_err(|error| ChatDataError::Json(error.to_string()))?;
    let texts = match line.tools {
        Some(tools) => template.answers(&line.messages, &options.clone().with_tools(tools)),
        None => template.answers(&line.messages, options),
    };
    Ok(texts?)
}

impl Chat {
    fn new(
        line: usize,
        rendered: &AnsweredText,
        tokenizer: &Tokenizer,
        context: usize,
    ) -> Result<Self, ChatDataError> {
        let AnsweredText { text, answers } = rendered;
        let tokens = tokenizer.encode_with_places(text)?;
        let answers = answers.iter().map(|answer| {
            // A token across the beginning is not the model's to write.
            let first = tokens.partition_point(|(_, place)| place.start < answer.start);
            let end = tokens.partition_point(|(_, place)| place.end <= answer.end);
            let of_answer = first..end.max(first);
            let is_mark = |&index: &usize| tokenizer.is_special(tokens[index].0);
            let mark = of_answer.clone().rev().find(is_mark);
            match mark.map(|mark| mark + 1) {
                Some(behind)
                    if tokens[behind..of_answer.end].iter().all(|(_, place)| {
                        text.get(place.clone()).is_some_and(|t| t.trim().is_empty())
                    }) =>
                {
                    first..behind
                }
                _ => of_answer,
            }
        });
        let answers: Vec<_> = answers.collect();
        // Nothing is to be learned from what is behind.
        let len = answers.last().map_or(0, |answer| answer.end);
        if len > context + 1 {
            return Err(ChatDataError::TooLong {
                tokens: len,
                context,
            });
        }
        let tokens = tokens[..len].iter().map(|(token, _)| *token);
        Ok(Self {
            line,
            tokens: tokens.collect(),
            answers,
        })
    }
}

impl Dataset<TokenWindow> for ChatWindows {
    fn get(&self, index: usize) -> Option<TokenWindow> {
        let chat = self.chats().get(index)?;
        let mut tokens = chat.tokens.clone();
        // A token that the vocabulary has.
        let padding = tokens.first().copied().unwrap_or(0);
        tokens.resize(self.context + 1, padding);
        let answers = chat.answers.iter().flat_map(|answer| {
            let targets = answer.clone().filter(|&token| token > 0);
            targets.map(|token| Answer {
                position: token - 1,
                distance: token - answer.start,
            })
        });
        Some(TokenWindow {
            inputs: tokens[..self.context].to_vec(),
            answers: Some(answers.collect()),
            targets: tokens.split_off(1),
        })
    }

    fn len(&self) -> usize {
        self.windows.len()
    }
}

impl Windows for ChatWindows {
    fn context(&self) -> usize {
        self.context
    }

    fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TrainError> {
        let mut chats = self.chats().iter();
        chats.try_for_each(|chat| check_vocabulary(&chat.tokens, vocab_size))
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = Xxh3Default::new();
        let mut update = |number: usize| hash.update(&(number as u64).to_le_bytes());
        for chat in self.chats() {
            update(chat.tokens.len());
            chat.tokens.iter().for_each(|&token| update(token as usize));
            for answer in &chat.answers {
                update(answer.start);
                update(answer.end);
            }
        }
        hash.digest()
    }

    fn has_answers(&self) -> bool {
        true
    }
}
