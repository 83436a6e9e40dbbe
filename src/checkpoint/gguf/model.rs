//! What model a file has: its architecture, its sizes, and where each of its tensors goes.

use std::collections::BTreeSet;

use super::architectures::{
    ARCHITECTURES, Architecture, Change, Family, Needed, ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT,
    Row, Size,
};
use super::error::GgufError;
use super::file::GgufFile;
use super::keys::Keys;
use crate::parameters::TensorSpec;

/// A model that can be imported.
#[derive(Debug)]
pub(super) struct Model {
    pub architecture: &'static Architecture,
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub ffn_size: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    /// In the order they are written.
    pub tensors: Vec<Planned>,
}

/// A tensor to write.
#[derive(Debug)]
pub(super) struct Planned {
    /// Its name in the file.
    pub source: String,
    pub spec: TensorSpec,
    pub change: Change,
}

impl Model {
    /// Reads the sizes and checks that the file has the tensors they ask for, and no other.
    pub fn of(file: &GgufFile) -> Result<Self, GgufError> {
        let architecture = architecture(file)?;
        let keys = Keys::of(file, architecture.name);
        check_refused(&keys, architecture.family)?;
        let embedding = "token_embd.weight";
        let place = file.tensors().get(embedding);
        let place = place.ok_or_else(|| file.missing(embedding))?;
        let n_heads = keys.needed_count(".attention.head_count")?;
        let hidden_size = keys.needed_count(".embedding_length")?;
        let head_dim = match keys.count(".attention.key_length")? {
            Some(head_dim) => head_dim,
            None => hidden_size / n_heads,
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(keys.wrong(
                ".attention.key_length",
                format!("an even number, as that of {hidden_size}/{n_heads} if missing"),
            ));
        }
        let value_dim = keys.count(".attention.value_length")?;
        if value_dim.is_some_and(|value_dim| value_dim != head_dim) {
            return Err(keys.wrong(".attention.value_length", format!("{head_dim}, as of keys")));
        }
        let has = |needed| {
            rows(architecture).any(|row| {
                row.needed == needed && file.tensors().contains_key(&row.gguf.replace("{}", "0"))
            })
        };
        let slides = keys.count(".attention.sliding_window")?.unwrap_or(0) > 0;
        let mut model = Self {
            architecture,
            // A llama that slides is what Hugging Face calls a Mistral.
            family: match architecture.family {
                Family::Llama if slides => Family::Mistral,
                family => family,
            },
            vocab_size: place.shape().first().copied().unwrap_or(0),
            hidden_size,
            ffn_size: keys.needed_count(".feed_forward_length")?,
            n_layers: keys.needed_count(".block_count")?,
            n_heads,
            n_kv_heads: match keys.get(".attention.head_count_kv") {
                Some(_) => keys.needed_count(".attention.head_count_kv")?,
                None => n_heads,
            },
            head_dim,
            tied: !has(Needed::Untied),
            attention_bias: has(Needed::AttentionBias),
            mlp_bias: has(Needed::MlpBias),
            tensors: Vec::new(),
        };
        model.tensors = model.planned(file)?;
        Ok(model)
    }

    fn size(&self, size: Size) -> usize {
        // Metadata may say anything.
        let q = self.n_heads.saturating_mul(self.head_dim);
        let kv = self.n_kv_heads.saturating_mul(self.head_dim);
        match size {
            Size::Vocab => self.vocab_size,
            Size::Hidden => self.hidden_size,
            Size::Ffn => self.ffn_size,
            Size::GateUp => self.ffn_size.saturating_mul(2),
            Size::HeadDim => self.head_dim,
            Size::Q => q,
            Size::Kv => kv,
            Size::Qkv => q.saturating_add(kv).saturating_add(kv),
        }
    }

    fn wants(&self, needed: Needed) -> bool {
        match needed {
            Needed::Always => true,
            Needed::Untied => !self.tied,
            Needed::AttentionBias => self.attention_bias,
            Needed::MlpBias => self.mlp_bias,
        }
    }

    fn planned(&self, file: &GgufFile) -> Result<Vec<Planned>, GgufError> {
        let mut planned = Vec::new();
        let mut plan = |row: &Row, layer: usize| {
            if !self.wants(row.needed) {
                return Ok(());
            }
            let layer = layer.to_string();
            let source = row.gguf.replace("{}", &layer);
            let expected: Vec<_> = row.shape.iter().map(|&size| self.size(size)).collect();
            let place = file.tensors().get(&source);
            let place = place.ok_or_else(|| file.missing(&source))?;
            if place.shape() != expected {
                return Err(GgufError::Shape {
                    path: file.path().to_owned(),
                    tensor: source,
                    found: place.shape().to_vec(),
                    expected,
                });
            }
            planned.push(Planned {
                source,
                spec: TensorSpec {
                    name: row.hf.replace("{}", &layer),
                    shape: expected,
                },
                change: row.change,
            });
            Ok(())
        };
        // The first layer that is not there ends it, however many are said to be.
        for layer in 0..self.n_layers {
            let here = |row: &&Row| row.gguf.contains("{}") || layer == 0;
            for row in rows(self.architecture).filter(here) {
                plan(row, layer)?;
            }
        }
        let known: BTreeSet<&str> = planned.iter().map(|tensor| &*tensor.source).collect();
        let unexpected = file
            .tensors()
            .keys()
            .find(|name| !known.contains(&***name) && !is_of_rope(name));
        match unexpected {
            Some(tensor) => Err(GgufError::UnexpectedTensor {
                path: file.path().to_owned(),
                tensor: tensor.clone(),
                architecture: self.architecture.name.to_owned(),
            }),
            None => Ok(planned),
        }
    }
}

fn rows(architecture: &'static Architecture) -> impl Iterator<Item = &'static Row> {
    architecture.tensors.iter().copied().flatten()
}

/// Tensors that are read for config.json, and what old converters wrote for each layer.
fn is_of_rope(name: &str) -> bool {
    [ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT].contains(&name)
        || name.ends_with(".attn_rot_embd.weight")
        || name.ends_with(".attention.rotary_emb.inv_freq")
}

fn architecture(file: &GgufFile) -> Result<&'static Architecture, GgufError> {
    let keys = Keys::of(file, "");
    let name = match keys.text("general.architecture")? {
        Some(name) => name,
        None => return Err(keys.wrong("general.architecture", known())),
    };
    let found = ARCHITECTURES.iter().find(|known| known.name == name);
    found.ok_or_else(|| GgufError::Architecture {
        path: file.path().to_owned(),
        found: name.to_owned(),
        known: known(),
    })
}

fn known() -> String {
    ARCHITECTURES.each_ref().map(|known| known.name).join(", ")
}

/// Refuses what changes what a model computes and none of the families does.
fn check_refused(keys: &Keys, family: Family) -> Result<(), GgufError> {
    let numbers = [
        ".expert_count",
        ".attention.clamp_kqv",
        ".attention.max_alibi_bias",
        ".embedding_scale",
        ".residual_scale",
        ".logit_scale",
    ];
    for key in numbers {
        if keys.number(key)?.unwrap_or(0.0) != 0.0 {
            return Err(keys.wrong(key, "none"));
        }
    }
    for (key, allowed) in [
        (".attention.causal", true),
        (".use_parallel_residual", false),
    ] {
        if keys.flag(key)?.unwrap_or(allowed) != allowed {
            return Err(keys.wrong(key, allowed.to_string()));
        }
    }
    // Olmo 3 is in files of this architecture, and slides.
    let slides = keys.count(".attention.sliding_window")?.unwrap_or(0) > 0;
    let never = [Family::Qwen2, Family::Qwen3, Family::SmolLm3, Family::Olmo2];
    if slides && never.contains(&family) {
        return Err(keys.wrong(".attention.sliding_window", "none"));
    }
    Ok(())
}
