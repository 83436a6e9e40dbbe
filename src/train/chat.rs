//! Chats to fine-tune on, of which the answers count.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use burn_dataset::Dataset;
use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3Default;

use super::chat_error::ChatDataError;
use super::data::{Answer, TokenWindow, Windows, check_fraction, check_vocabulary};
use super::error::TrainError;
use crate::text::{ChatAnswer, ChatMessage, ChatOptions, ChatTemplate};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Chats as windows, one behind the other in none: a window begins with its chat, as the model's own
/// template writes it, and only the answers' tokens count. What is behind the chat is padding, which
/// nothing before it sees.
///
/// Every answer is learned once, behind the very tokens that a model is given to ask for it. Mostly a
/// chat is one window. Where what was read before an answer is written, or divided into tokens,
/// otherwise once the chat has gone on, as by Qwen3's template, which leaves out what was thought, the
/// next answer has a window of its own, which begins with the chat again.
///
/// A clone shares the tokens.
#[derive(Clone, Debug)]
pub struct ChatWindows {
    chats: Arc<[Chat]>,
    windows: Range<usize>,
    context: usize,
}

/// The tokens of a window.
#[derive(Clone, Debug)]
struct Chat {
    /// The line of its file, counted from 1.
    line: usize,
    tokens: Vec<u32>,
    /// Those that the model is to write.
    answers: Vec<Range<usize>>,
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
    /// Answers are found by [`ChatTemplate::answers`]. Their tokens count, the mark of their end
    /// included and white space behind that left out. What is behind the last is passed over.
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
            let of_line = read_line(&json, tokenizer, template, &options, context);
            let of_line = of_line.map_err(|source| TrainError::Chat {
                path: path.to_owned(),
                line,
                source,
            })?;
            let chat = |(tokens, answers)| Chat {
                line,
                tokens,
                answers,
            };
            chats.extend(of_line.into_iter().map(chat));
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

/// Tokens, and where among them answers are.
type Answered = (Vec<u32>, Vec<Range<usize>>);

/// The windows that a line makes.
fn read_line(
    json: &str,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    options: &ChatOptions,
    context: usize,
) -> Result<Vec<Answered>, ChatDataError> {
    let line: Line =
        serde_json::from_str(json).map_err(|error| ChatDataError::Json(error.to_string()))?;
    let answers = match line.tools {
        Some(tools) => template.answers(&line.messages, &options.clone().with_tools(tools)),
        None => template.answers(&line.messages, options),
    };
    let mut windows: Vec<Answered> = Vec::new();
    for answer in answers? {
        let mut tokens = tokenizer.encode(&answer.prompt)?;
        let start = tokens.len();
        // The window goes on, if what has been learned already is read as it was.
        let goes_on = windows.pop_if(|(last, _)| tokens.starts_with(last));
        let mut answers = goes_on.map_or_else(Vec::new, |(_, answers)| answers);
        tokens.extend(answer_tokens(&answer, tokenizer)?);
        if tokens.len() > context + 1 {
            return Err(ChatDataError::TooLong {
                tokens: tokens.len(),
                context,
            });
        }
        answers.push(start..tokens.len());
        windows.push((tokens, answers));
    }
    Ok(windows)
}

/// The tokens of an answer behind its prompt, up to the mark of its end.
fn answer_tokens(
    ChatAnswer { prompt, answer }: &ChatAnswer,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, TokenizerError> {
    let whole = tokenizer.encode_with_places(&format!("{prompt}{answer}"))?;
    let across =
        |(_, place): &(u32, Range<usize>)| place.start < prompt.len() && prompt.len() < place.end;
    let (tokens, text) = match whole.iter().any(across) {
        // A model that has read the prompt cannot write a token that begins in it.
        true => (tokenizer.encode_with_places(answer)?, answer.clone()),
        false => {
            let behind = whole.into_iter();
            let behind = behind.filter(|(_, place)| place.start >= prompt.len());
            (behind.collect(), format!("{prompt}{answer}"))
        }
    };
    let is_mark = |(token, _): &(u32, _)| tokenizer.is_special(*token);
    let end = tokens.iter().rposition(is_mark).map_or(0, |mark| mark + 1);
    let is_space = |(_, place): &(u32, Range<usize>)| {
        text.get(place.clone())
            .is_some_and(|text| text.trim().is_empty())
    };
    let end = match tokens[end..].iter().all(is_space) && end > 0 {
        true => end,
        false => tokens.len(),
    };
    Ok(tokens[..end].iter().map(|(token, _)| *token).collect())
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
