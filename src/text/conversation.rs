//! Answers whose prompts have much in common: what is cached is not read again.

use burn::tensor::backend::Backend;

use super::config::TextConfig;
use super::error::TextError;
use super::generation::{Completion, TextFinish, TextGeneration, TextPiece};
use super::generator::TextGenerator;
use super::prompt::Prompt;
use crate::cache::{CacheDtype, FusedKvCache};
use crate::generate::{GenerateError, generate_from};

/// One text after the other through the same cache. Of each prompt only what the cache does not
/// begin with is read: in a chat the last answer's end and the new question.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::text::TextGenerator;
/// use fusedkv::tokenizer::Tokenizer;
/// use fusedkv::{CacheDtype, FusedKvDecoderConfig, KvPlan};
///
/// let tokenizer = Tokenizer::train_bpe("", 257)?; // a token per byte
/// let config = FusedKvDecoderConfig::tiny(257, KvPlan::FusedKv { storage_layers: 3 });
/// let model = config.init::<Flex>(&FlexDevice::default())?;
/// let generator = TextGenerator::new(model, tokenizer);
/// let mut config = generator.defaults().clone();
/// config.generation.max_new_tokens = 4;
///
/// let mut conversation = generator.conversation(64, CacheDtype::Model)?;
/// conversation.write("to be or not", &config)?;
/// assert_eq!(conversation.reused(), 0);
/// conversation.write("to be or be", &config)?;
/// assert_eq!(conversation.reused(), "to be or ".len());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Conversation<'g, B: Backend> {
    generator: &'g TextGenerator<B>,
    /// None while it is being written with.
    cache: Option<FusedKvCache<B>>,
    dtype: CacheDtype,
    capacity: usize,
    /// What the cache holds.
    tokens: Vec<u32>,
    reused: usize,
}

impl<B: Backend> TextGenerator<B> {
    /// An empty conversation of up to `capacity` tokens, whose cache is kept from one answer to the
    /// next and holds such numbers.
    ///
    /// # Errors
    /// [`CacheError`](crate::CacheError) as [`FusedKvDecoder::new_cache_of`](crate::FusedKvDecoder::new_cache_of).
    pub fn conversation(
        &self,
        capacity: usize,
        dtype: CacheDtype,
    ) -> Result<Conversation<'_, B>, TextError> {
        let cache = self.model().new_cache_of(dtype, 1, capacity)?;
        Ok(Conversation {
            generator: self,
            dtype,
            capacity,
            cache: Some(cache),
            tokens: Vec::new(),
            reused: 0,
        })
    }
}

impl<'g, B: Backend> Conversation<'g, B> {
    /// Tokens of the last prompt that were in the cache already.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// Tokens that the cache holds.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The cache, e.g. for its size.
    pub fn cache(&self) -> Option<&FusedKvCache<B>> {
        self.cache.as_ref()
    }

    /// Continues a prompt.
    ///
    /// # Errors
    /// As [`write_with`](Self::write_with).
    pub fn write(
        &mut self,
        prompt: impl Into<Prompt>,
        config: &TextConfig,
    ) -> Result<Completion, TextError> {
        self.write_with(prompt, config, |_| Ok(()))
    }

    /// [`write`](Self::write), calling `each` with every piece as it is written.
    ///
    /// # Errors
    /// [`TextError`] as [`TextGenerator::generate`], [`TextError::ConversationTooLong`] if prompt and
    /// new tokens do not fit the cache, [`GenerateError::Setting`] for more than one of `samples`,
    /// and the first error of `each`. The conversation can be gone on with in any case.
    pub fn write_with<E: From<TextError>>(
        &mut self,
        prompt: impl Into<Prompt>,
        config: &TextConfig,
        mut each: impl FnMut(&TextPiece) -> Result<(), E>,
    ) -> Result<Completion, E> {
        let prompt = prompt.into();
        let mut generation = self.start(&prompt, config)?;
        let mut completion = Completion {
            text: String::new(),
            tokens: Vec::new(),
            finish: TextFinish::Length,
        };
        let mut result = Ok(());
        for piece in generation.by_ref() {
            result = piece.map_err(E::from).and_then(|piece| {
                let seen = each(&piece);
                completion.take(piece);
                seen
            });
            if result.is_err() {
                break;
            }
        }
        let cache = generation.into_cache();
        self.tokens
            .extend(completion.tokens.iter().map(|token| token.id));
        self.tokens.truncate(cache.len());
        self.cache = Some(cache);
        result.map(|()| completion)
    }

    /// Begins to continue a prompt; `tokens` are the prompt's then.
    fn start(
        &mut self,
        prompt: &Prompt,
        config: &TextConfig,
    ) -> Result<TextGeneration<'g, B>, TextError> {
        let generator = self.generator;
        let tokens = [generator.tokens(prompt)?];
        let (config, stops) = generator.checked(&tokens, config)?;
        let [tokens] = tokens;
        if config.samples != 1 {
            return Err(TextError::from(GenerateError::Setting {
                field: "samples",
                value: config.samples as f64,
                expected: "1 in a conversation",
            }));
        }
        let max_new_tokens = config.max_new_tokens;
        if tokens.len() + max_new_tokens - 1 > self.capacity {
            return Err(TextError::ConversationTooLong {
                tokens: tokens.len(),
                max_new_tokens,
                capacity: self.capacity,
            });
        }
        let mut cache = match self.cache.take() {
            Some(cache) => cache,
            // Lost to a panic.
            None => generator
                .model()
                .new_cache_of(self.dtype, 1, self.capacity)?,
        };
        let common = self.tokens.iter().zip(&tokens).take_while(|(a, b)| a == b);
        // The last token is read again, for its logits.
        let mut reused = common.count().min(tokens.len() - 1).min(cache.len());
        if cache.truncate(reused).is_err() {
            cache.reset();
            reused = 0;
        }
        self.reused = reused;
        self.tokens.clear();
        let kept = cache.clone();
        match generate_from(generator.model(), cache, &[&tokens], &config) {
            Ok(generation) => {
                let row = (generator.stream(prompt, &tokens), stops.scan());
                self.tokens = tokens;
                Ok(TextGeneration::new(generation, vec![row], stops))
            }
            Err(error) => {
                self.tokens.clone_from(&tokens);
                self.tokens.truncate(kept.len());
                self.cache = Some(kept);
                Err(error.into())
            }
        }
    }
}
