//! The whole road of a model that somebody has: a GGUF file, converted to half its cache, its weights
//! and cache in 8 bits, chats of different lengths answered in one batch.

use std::path::Path;

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::gguf::{GgufOptions, import_gguf};
use fusedkv::checkpoint::{LoadOptions, SaveOptions, load_checkpoint, save_checkpoint};
use fusedkv::convert::convert_fitted;
use fusedkv::text::{ChatMessage, ChatTemplate, Prompt, TextGenerator};
use fusedkv::{CacheDtype, KvPlan, WeightFormat};
use tempfile::tempdir;

use crate::checks::{Subject, agree_but_for_ties, rounding};

/// In the words of the file's vocabulary.
const TEMPLATE: &str = "{% for message in messages %}<turn>{{ message.content }}{% endfor %}<turn>";

/// The chats that are answered, of one, three and two messages.
fn chats() -> Vec<Prompt> {
    let chats = [
        &["the cat"][..],
        &["the cat sat on a thing", "abc", "the"],
        &["cat the thing", "a b"],
    ];
    let prompt = |chat: &&[&str]| {
        let messages = chat.iter().enumerate().map(|(i, text)| match i % 2 {
            0 => ChatMessage::user(text),
            _ => ChatMessage::assistant(text),
        });
        Prompt::Chat(messages.collect())
    };
    chats.iter().map(prompt).collect()
}

fn generator<B: Backend>(
    model: &Path,
    device: &B::Device,
    weights: WeightFormat,
) -> TextGenerator<B> {
    let options = LoadOptions::new().with_weights(weights);
    let generator = TextGenerator::load(model, options, device).unwrap();
    generator.with_template(ChatTemplate::new(TEMPLATE))
}

/// Tokens and text of every answer.
fn answers<B: Backend>(generator: &TextGenerator<B>, cache: CacheDtype) -> Vec<(Vec<u32>, String)> {
    let mut config = generator.defaults().clone();
    config.generation.max_new_tokens = 40;
    config.generation.temperature = 0.0;
    config.generation.cache_dtype = cache;
    let generation = generator.generate(&chats(), &config).unwrap();
    let answers = generation.completions().unwrap().into_iter();
    let answers = answers.map(|answer| {
        let ids = answer.tokens.iter().map(|token| token.id).collect();
        (ids, answer.text)
    });
    answers.collect()
}

/// Gemma 3's block, whose windows are shorter than the chats, from the file to the answers: the same
/// on every backend, up to ties where products are TF32. One without 8-bit numbers widens the weights, and
/// keeps its cache in floats.
pub fn whole_road<B: Backend>(subject: &Subject<B>) {
    if matches!(subject.dtype, DType::F16 | DType::BF16) {
        // Directories are loaded as f32 here, which others run.
        return;
    }
    let directory = tempdir().unwrap();
    let [standard, fused] = ["standard", "fused"].map(|name| directory.path().join(name));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/gemma3.gguf");
    let options = GgufOptions::new().with_weights(WeightFormat::Int8);
    import_gguf(file, &standard, &options).unwrap();

    let loaded = load_checkpoint::<Flex>(&standard, LoadOptions::new(), &FlexDevice).unwrap();
    let plan = KvPlan::FusedKv { storage_layers: 6 };
    let text: Vec<u32> = (0..300).map(|i| (i * i + 3 * i) % 40).collect();
    let (model, _) = convert_fitted(&loaded.model, &plan, &text, 48).unwrap();
    let window = model.config().layer(0).kind.window.unwrap();
    let model = model.with_weights(WeightFormat::Int8).unwrap();
    let options = SaveOptions::new()
        .with_eos(loaded.eos)
        .with_tokenizer(loaded.tokenizer.unwrap());
    save_checkpoint(&fused, &model, &options).unwrap();

    let eight_bits = subject.cache_dtypes.contains(&CacheDtype::Int8);
    let (weights, cache) = match eight_bits {
        true => (WeightFormat::Int8, CacheDtype::Int8),
        false => (WeightFormat::Model, CacheDtype::Model),
    };
    let found = answers(&generator::<B>(&fused, &subject.device, weights), cache);
    let reference = generator::<Flex>(&fused, &FlexDevice, WeightFormat::Int8);
    let expected = answers(&reference, cache);
    if !subject.tf32 {
        assert_eq!(found, expected);
    }
    for (i, prompt) in chats().iter().enumerate() {
        let prompt = reference.tokens(prompt).unwrap();
        let ids = [&found[i].0[..], &expected[i].0];
        let tolerance = subject.tolerance() + rounding(cache);
        agree_but_for_ties(
            &format!("answer {i}"),
            reference.model(),
            &prompt,
            ids,
            tolerance,
        );
    }
    assert!(found.iter().all(|(ids, _)| ids.len() > window), "{found:?}");
}
