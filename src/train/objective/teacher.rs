//! A decoder that another learns from.

use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorData};

use super::Distillation;
use crate::config::FusedKvDecoderConfig;
use crate::decoder::FusedKvDecoder;
use crate::plan::{KvLayout, KvPart};
use crate::train::config::TrainingConfig;
use crate::train::error::TrainError;
use crate::train::trainable::trains;

/// A teacher, and what it has in common with its student.
#[derive(Debug)]
pub(in crate::train) struct Teacher<B: Backend> {
    pub config: Distillation,
    /// Layers from the bottom, the embedding below them, that are the student's own, do not train, and
    /// that nothing above them reads keys or values of: their output is computed once for both.
    shared: Option<usize>,
    /// Layers of which the streams above them are matched, by the number of the next one.
    matched: Option<RangeInclusive<usize>>,
    /// One on each device it was asked for on.
    copies: Mutex<Vec<FusedKvDecoder<B>>>,
}

/// What a teacher makes of a batch.
pub(in crate::train) struct Reading<B: Backend> {
    pub model: FusedKvDecoder<B>,
    /// What its head reads, `[batch, context, hidden_size]`.
    pub hidden: Tensor<B, 3>,
    /// Its residual streams that are matched.
    pub streams: Vec<Tensor<B, 3>>,
}

impl<B: Backend> Teacher<B> {
    /// Checks that a training's model can learn from a teacher.
    ///
    /// # Errors
    /// [`TrainError::Teacher`] or [`TrainError::ContextTooLong`].
    pub fn check(
        teacher: &FusedKvDecoder<B>,
        config: &TrainingConfig,
        distillation: Distillation,
    ) -> Result<(), TrainError> {
        let (of, to) = (teacher.config(), &config.model);
        let hidden = distillation.hidden_weight > 0.0;
        for (field, found, expected, needed) in [
            ("vocab_size", of.vocab_size, to.vocab_size, true),
            ("n_layers", of.n_layers, to.n_layers, hidden),
            ("hidden_size", of.hidden_size, to.hidden_size, hidden),
        ] {
            if needed && found != expected {
                return Err(TrainError::Teacher {
                    field,
                    found,
                    expected,
                });
            }
        }
        if config.context > of.max_positions {
            return Err(TrainError::ContextTooLong {
                context: config.context,
                max_positions: of.max_positions,
            });
        }
        Ok(())
    }

    /// The teacher, [checked](Self::check), of a student whose parameters that do not train are frozen,
    /// under each of the plans that it is trained under.
    pub fn new<A: AutodiffBackend<InnerBackend = B>>(
        teacher: FusedKvDecoder<B>,
        student: &FusedKvDecoder<A>,
        plans: &[KvLayout],
        config: Distillation,
    ) -> Self {
        // Random weights are drawn when they are first used, by every copy anew.
        let device = teacher.device();
        let mut teacher = teacher.fork(&device);
        let shared = shared(&teacher, student, plans);
        if let Some(layers) = shared {
            // One copy in memory.
            teacher.embed_tokens = student.embed_tokens.valid();
            for (own, of) in teacher.layers.iter_mut().zip(&student.layers).take(layers) {
                *own = of.valid();
            }
        }
        let lowest = student.layers.iter().position(trains::<A, _>);
        let layers = student.layers.len();
        let lowest = lowest.filter(|_| config.hidden_weight > 0.0);
        Self {
            config,
            shared,
            matched: lowest.map(|lowest| lowest + 1..=layers),
            copies: Mutex::new(vec![teacher]),
        }
    }

    /// Whether the student's stream below this layer is what the teacher goes on from.
    pub fn goes_on_from(&self, layer: usize) -> bool {
        self.shared == Some(layer)
    }

    /// Whether the streams below this layer are matched.
    pub fn matches(&self, layer: usize) -> bool {
        self.matched
            .as_ref()
            .is_some_and(|layers| layers.contains(&layer))
    }

    /// Reads a batch, or goes on from the student's stream where it begins to differ.
    ///
    /// # Panics
    /// As [`FusedKvDecoder::forward`], and if windows are longer than the teacher's positions.
    pub fn read(&self, tokens: Tensor<B, 2, Int>, below: Option<Tensor<B, 3>>) -> Reading<B> {
        let model = self.on(&tokens.device());
        let mut streams = Vec::new();
        let from = self.shared.zip(below);
        let hidden = model.states(tokens, from, &mut |layer, x| {
            if self.matches(layer) {
                streams.push(x.clone());
            }
        });
        Reading {
            hidden: hidden.expect("the windows' length is checked, and batches are never empty"),
            model,
            streams,
        }
    }

    /// The teacher on a device.
    fn on(&self, device: &B::Device) -> FusedKvDecoder<B> {
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let here = |copy: &&FusedKvDecoder<B>| copy.device() == *device;
        if let Some(copy) = copies.iter().find(here) {
            return copy.clone();
        }
        let copy = copies[0].clone().fork(device);
        copies.push(copy.clone());
        copy
    }
}

/// The most layers that both share, if their embeddings are the same.
fn shared<A: AutodiffBackend>(
    teacher: &FusedKvDecoder<A::InnerBackend>,
    student: &FusedKvDecoder<A>,
    plans: &[KvLayout],
) -> Option<usize> {
    let (of, to) = (teacher.config(), student.config());
    let alike = FusedKvDecoderConfig {
        plan: to.plan.clone(),
        tie_embeddings: to.tie_embeddings,
        max_positions: to.max_positions,
        // Which a teacher never has.
        dropout: 0.0,
        init_std: to.init_std,
        fusion_init: to.fusion_init,
        ..of.clone()
    };
    let frozen = !trains::<A, _>(&student.embed_tokens);
    let same = numbers::<A::InnerBackend, _>(&teacher.embed_tokens)
        == numbers::<A, _>(&student.embed_tokens);
    // What layers are given of the tokens themselves comes from outside of them.
    let given = of.block.layer_input_size.is_some();
    if alike != *to || !frozen || !same || given {
        return None;
    }
    let own = teacher.layout();
    let layers = (0..own.n_layers())
        .take_while(|&i| {
            let (of, to) = (&teacher.layers[i], &student.layers[i]);
            plans.iter().all(|plan| plan.layer(i) == own.layer(i))
                && !trains::<A, _>(to)
                && numbers::<A::InnerBackend, _>(of) == numbers::<A, _>(to)
        })
        .count();
    // What is above must do without the keys and values of what is below.
    let reads_below = |from: usize| {
        (from..own.n_layers()).any(|layer| {
            KvPart::BOTH.into_iter().any(|part| {
                let residual = own.layer(layer).part(part).residual();
                let mut reads = own.sources(part, layer).iter().copied().chain(residual);
                reads.any(|source| source < from)
            })
        })
    };
    (0..=layers).rev().find(|&from| !reads_below(from))
}

/// All numbers of a module.
fn numbers<B: Backend, M: Module<B>>(module: &M) -> Vec<TensorData> {
    struct Numbers(Vec<TensorData>);

    impl<B: Backend> ModuleVisitor<B> for Numbers {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.push(param.val().into_data());
        }
    }

    let mut numbers = Numbers(Vec::new());
    module.visit(&mut numbers);
    numbers.0
}
