//! A decoder with what makes tokens of text.

use std::path::Path;

use burn::tensor::backend::Backend;

use super::chat_error::ChatError;
use super::config::TextConfig;
use super::directory;
use super::error::TextError;
use super::generation::TextGeneration;
use super::message::ChatMessage;
use super::prompt::Prompt;
use super::stop::StopStrings;
use super::template::{ChatOptions, ChatTemplate};
use crate::checkpoint::{LoadOptions, load_adapter, load_checkpoint};
use crate::decoder::FusedKvDecoder;
use crate::generate::{GenerationConfig, generate};
use crate::tokenizer::{TextStream, Tokenizer};

/// A decoder that reads and writes text: with its tokenizer, its chat template, and how its texts
/// are drawn by default.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::text::{ChatMessage, ChatTemplate, TextGenerator};
/// use fusedkv::tokenizer::Tokenizer;
/// use fusedkv::{FusedKvDecoderConfig, GenerationConfig, KvPlan};
///
/// let tokenizer = Tokenizer::train_bpe("", 257)?; // a token per byte
/// let config = FusedKvDecoderConfig::tiny(257, KvPlan::FusedKv { storage_layers: 3 });
/// let model = config.init::<Flex>(&FlexDevice::default())?;
/// let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>";
/// let generator = TextGenerator::new(model, tokenizer).with_template(ChatTemplate::new(template));
///
/// let mut config = generator.defaults().clone();
/// config.generation.max_new_tokens = 5;
/// let chat = vec![ChatMessage::user("Hello")];
/// for piece in generator.generate(&["FusedKV".into(), chat.into()], &config)? {
///     let piece = piece?;
///     print!("{}: {:?} ", piece.token.row, piece.text);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct TextGenerator<B: Backend> {
    model: FusedKvDecoder<B>,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    options: ChatOptions,
    defaults: TextConfig,
    ignored: Vec<String>,
}

impl<B: Backend> TextGenerator<B> {
    /// A decoder with its tokenizer; no chat template, and the likeliest token each time.
    pub fn new(model: FusedKvDecoder<B>, tokenizer: Tokenizer) -> Self {
        Self {
            model,
            tokenizer,
            template: None,
            options: ChatOptions::new(),
            defaults: TextConfig::new(GenerationConfig::new()),
            ignored: Vec::new(),
        }
    }

    /// Loads a model's directory: decoder, tokenizer, chat template if there is one, and the defaults
    /// of `generation_config.json`. `options` may be the decoder's float type alone.
    ///
    /// # Errors
    /// [`TextError::Checkpoint`] as [`load_checkpoint`], and [`TextError::NoTokenizer`].
    pub fn load(
        directory: impl AsRef<Path>,
        options: impl Into<LoadOptions>,
        device: &B::Device,
    ) -> Result<Self, TextError> {
        let directory = directory.as_ref();
        let template = ChatTemplate::from_directory(directory)?;
        let loaded = load_checkpoint::<B>(directory, options, device)?;
        let tokenizer = loaded.tokenizer.ok_or_else(|| TextError::NoTokenizer {
            directory: directory.to_owned(),
        })?;
        let (defaults, ignored) = directory::defaults(directory, &loaded.eos)?;
        Ok(Self {
            template,
            defaults,
            ignored,
            ..Self::new(loaded.model, tokenizer)
        })
    }

    /// The generator with adapters beside its decoder's weights, as [`load_adapter`] loads them.
    ///
    /// # Errors
    /// [`TextError::Checkpoint`].
    pub fn with_adapter(self, directory: impl AsRef<Path>) -> Result<Self, TextError> {
        Ok(Self {
            model: load_adapter(directory, self.model)?,
            ..self
        })
    }

    /// The generator with a chat template, in place of one it has.
    #[must_use]
    pub fn with_template(self, template: ChatTemplate) -> Self {
        Self {
            template: Some(template),
            ..self
        }
    }

    /// The generator with other [`defaults`](Self::defaults).
    #[must_use]
    pub fn with_defaults(self, defaults: TextConfig) -> Self {
        Self { defaults, ..self }
    }

    /// What the chat template is told besides the messages, e.g. tools.
    #[must_use]
    pub fn with_chat_options(self, options: ChatOptions) -> Self {
        Self { options, ..self }
    }

    /// The decoder.
    pub fn model(&self) -> &FusedKvDecoder<B> {
        &self.model
    }

    /// Text to tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template, if there is one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// How texts are written if nothing else is asked for: what the model's `generation_config.json`
    /// says.
    pub fn defaults(&self) -> &TextConfig {
        &self.defaults
    }

    /// Keys of the model's `generation_config.json` that ask for what this crate does not do, e.g.
    /// `min_p`. They change nothing.
    pub fn ignored_settings(&self) -> &[String] {
        &self.ignored
    }

    /// A chat as the model reads it.
    ///
    /// # Errors
    /// [`ChatError`], [`ChatError::NoTemplate`] if the model has none.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, ChatError> {
        let template = self.template.as_ref().ok_or(ChatError::NoTemplate)?;
        template.render(messages, &self.options)
    }

    /// The tokens of a prompt. A chat's template writes all special tokens itself.
    ///
    /// # Errors
    /// [`TextError::Chat`] or [`TextError::Tokenizer`].
    pub fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, TextError> {
        Ok(match prompt {
            Prompt::Text(text) => self.tokenizer.encode_prompt(text)?,
            Prompt::Chat(messages) => self.tokenizer.encode(&self.render(messages)?)?,
            Prompt::Tokens(tokens) => tokens.clone(),
        })
    }

    /// Continues every prompt, all in one batch, as [`generate`] does: text as it is certain. With
    /// several `samples` prompt i is continued by the rows from `i * samples`, and read once.
    ///
    /// # Errors
    /// [`TextError`] before anything is computed. A row whose logits are no numbers is
    /// [`GenerateError::NotANumber`](crate::GenerateError::NotANumber) in its turn.
    pub fn generate(
        &self,
        prompts: &[Prompt],
        config: &TextConfig,
    ) -> Result<TextGeneration<'_, B>, TextError> {
        let tokens = prompts.iter().map(|prompt| self.tokens(prompt));
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        let (config, stops) = self.checked(&tokens, config)?;
        let generation = generate(&self.model, &tokens, &config)?;
        let rows = prompts.iter().zip(&tokens);
        let rows = rows.flat_map(|row| std::iter::repeat_n(row, config.samples));
        let rows = rows.map(|(prompt, tokens)| (self.stream(prompt, tokens), stops.scan()));
        Ok(TextGeneration::new(
            generation,
            rows.collect(),
            stops.clone(),
        ))
    }

    /// Text behind a prompt. An answer is a text of its own.
    pub(super) fn stream(&self, prompt: &Prompt, tokens: &[u32]) -> TextStream<'_> {
        let stream = self.tokenizer.stream().without_special();
        match prompt {
            Prompt::Chat(_) => stream,
            _ => stream.after(tokens),
        }
    }

    /// Settings for prompts of these tokens, if they are in order, and what ends a text.
    pub(super) fn checked(
        &self,
        prompts: &[Vec<u32>],
        config: &TextConfig,
    ) -> Result<(GenerationConfig, StopStrings), TextError> {
        let stops = StopStrings::new(config.stop_strings.iter().cloned())?;
        let mut generation = config.generation.clone();
        generation.validate()?;
        // Special tokens are no text.
        let tokens = stops
            .strings()
            .iter()
            .map(|stop| self.tokenizer.token_id(stop));
        let special = |token: &u32| self.tokenizer.is_special(*token);
        generation
            .stop_tokens
            .extend(tokens.flatten().filter(special));
        let max_new_tokens = generation.max_new_tokens;
        let max_positions = self.model.config().max_positions;
        for (row, tokens) in prompts.iter().map(Vec::len).enumerate() {
            if tokens == 0 {
                return Err(TextError::EmptyPrompt { row });
            }
            if tokens.saturating_add(max_new_tokens) > max_positions {
                return Err(TextError::PromptTooLong {
                    row,
                    tokens,
                    max_new_tokens,
                    max_positions,
                });
            }
        }
        Ok((generation, stops))
    }
}
