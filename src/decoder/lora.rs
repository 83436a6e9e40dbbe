//! Adapters of low rank beside projections (LoRA, arXiv 2106.09685).

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Distribution, Tensor, backend::Backend};
use thiserror::Error;

use super::{FusedKvDecoder, Weight, WeightError};
use crate::kernels::linear;
use crate::numbers::at_least_f32;

/// Which projections have adapters, and of what size.
///
/// ```
/// use fusedkv::LoraConfig;
///
/// let config = LoraConfig::new(8, 16.0)
///     .with_targets(["q_proj", "down_proj"].map(str::to_owned).into());
/// assert_eq!(config.scale(), 2.0);
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct LoraConfig {
    /// r, the width between the two matrices of an adapter.
    pub rank: usize,
    /// α; what an adapter adds is multiplied with α / r.
    pub alpha: f64,
    /// The projections of every layer that have one, by their names in a checkpoint: `q_proj`, or
    /// `self_attn.q_proj`. A layer that has no projection of a name, as one whose keys are another's,
    /// has no adapter there. Queries and values, as in the paper, if not set.
    #[config(default = "queries_and_values()")]
    pub targets: Vec<String>,
}

fn queries_and_values() -> Vec<String> {
    ["q_proj", "v_proj"].map(str::to_owned).into()
}

impl LoraConfig {
    /// α / r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Whether a layer's projection, as `self_attn.q_proj`, is a target.
    fn selects(&self, projection: &str) -> bool {
        self.targets.iter().any(|target| names(target, projection))
    }
}

/// Whether a target is the end of a projection's name.
fn names(target: &str, projection: &str) -> bool {
    let before = projection.strip_suffix(target);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Adapters that a decoder cannot have.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum LoraError {
    /// No width at all.
    #[error("adapters of rank 0, expected 1 or more")]
    Rank,
    /// A factor that is none.
    #[error("adapters of alpha {0}, expected a positive number")]
    Alpha(f64),
    /// No projection to stand beside.
    #[error("adapters without targets, expected one or more of {}", .0.join(", "))]
    NoTargets(Vec<String>),
    /// A name of no projection of any layer.
    #[error("no layer has a projection `{target}`, expected one of {}", known.join(", "))]
    UnknownTarget {
        /// What was asked for.
        target: String,
        /// The projections that layers have.
        known: Vec<String>,
    },
    /// The decoder has adapters already.
    #[error("the decoder has adapters already, expected none: merge them first")]
    Adapted,
}

/// The adapter of a projection: it adds `α / r · (x · a) · b`.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// `[input, rank]`; random at first, uniform within ±1/√input.
    pub a: Param<Tensor<B, 2>>,
    /// `[rank, output]`; 0 at first, so that nothing is added.
    pub b: Param<Tensor<B, 2>>,
    scale: f64,
}

impl<B: Backend> Lora<B> {
    fn new(
        config: &LoraConfig,
        [input, output]: [usize; 2],
        dtype: DType,
        device: &B::Device,
    ) -> Self {
        // Kaiming's with a slope of √5, as PEFT has it.
        let bound = (input as f64).sqrt().recip();
        let spread = Distribution::Uniform(-bound, bound);
        let a = Tensor::<B, 2>::random([input, config.rank], spread, device).cast(dtype);
        let b = Tensor::zeros([config.rank, output], (device, dtype));
        Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            scale: config.scale(),
        }
    }

    /// What it adds to `[batch, seq, output]`, of x `[batch, seq, input]`.
    pub(super) fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.through(x, self.b.val())
    }

    /// Some columns of [`forward`](Self::forward).
    pub(super) fn forward_to(&self, columns: Range<usize>, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.through(x, self.b.val().narrow(1, columns.start, columns.len()))
    }

    fn through(&self, x: Tensor<B, 3>, b: Tensor<B, 2>) -> Tensor<B, 3> {
        linear(linear(x, self.a.val()), b) * self.scale
    }

    /// What the projection's weight becomes by it: α / r · a · b, `[input, output]`, in f32 at least.
    fn product(&self) -> Tensor<B, 2> {
        let wide = |x: &Param<Tensor<B, 2>>| {
            let x = x.val().detach();
            let dtype = at_least_f32(x.dtype());
            x.cast(dtype)
        };
        wide(&self.a).matmul(wide(&self.b)) * self.scale
    }
}

impl<B: Backend> FusedKvDecoder<B> {
    /// The decoder with adapters that change nothing yet beside the projections that `config` names,
    /// whatever its matrices are kept in: to be trained, or filled.
    ///
    /// ```
    /// use fusedkv::backend::{Flex, FlexDevice};
    /// use fusedkv::{FusedKvDecoderConfig, KvPlan, LoraConfig};
    ///
    /// let config = FusedKvDecoderConfig::tiny(256, KvPlan::FusedKv { storage_layers: 3 });
    /// let model = config.init::<Flex>(&FlexDevice::default())?;
    /// let model = model.with_lora(&LoraConfig::new(4, 8.0))?;
    /// let a = model.parameter::<2>("model.layers.0.self_attn.q_proj.lora.a");
    /// assert_eq!(a.unwrap().dims(), [128, 4]);
    /// let model = model.merge_lora()?;
    /// assert!(model.lora().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`LoraError`].
    pub fn with_lora(mut self, config: &LoraConfig) -> Result<Self, LoraError> {
        self.lora_targets(config)?;
        let (dtype, device) = (self.dtype(), self.device());
        self.try_for_each_projection(|_, name, projection| {
            if config.selects(name) {
                let dims = projection.weight.dims();
                projection.lora = Some(Lora::new(config, dims, dtype, &device));
            }
            Ok::<_, LoraError>(())
        })?;
        self.lora = Some(Arc::new(config.clone()));
        Ok(self)
    }

    /// What its adapters are, if it has any.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_deref()
    }

    /// The decoder whose weights compute what they did with its adapters, but for rounding: each
    /// matrix is in the format it was in, which for one of few bits rounds again. One without adapters
    /// is returned as it is.
    ///
    /// # Errors
    /// [`WeightError::Overflow`] for a sum that the format has no number for.
    pub fn merge_lora(mut self) -> Result<Self, WeightError> {
        let dtype = self.dtype();
        self.try_for_each_projection(|layer, name, projection| {
            let Some(lora) = projection.lora.take() else {
                return Ok(());
            };
            let (weight, format) = (&projection.weight, projection.weight.format());
            let product = lora.product();
            let wide = weight.val().detach().cast(product.dtype());
            let sum = Weight::from(Param::initialized(weight.id(), wide + product));
            projection.weight =
                sum.into_format(format, dtype, 1)
                    .map_err(|value| WeightError::Overflow {
                        tensor: format!("model.layers.{layer}.{name}.weight"),
                        value,
                        format,
                    })?;
            Ok(())
        })?;
        self.lora = None;
        Ok(self)
    }

    /// Where it would have adapters of a configuration: the layer, the name of the projection in it,
    /// and its `[input, output]`.
    ///
    /// # Errors
    /// [`LoraError`].
    pub(crate) fn lora_targets(
        &self,
        config: &LoraConfig,
    ) -> Result<Vec<(usize, String, [usize; 2])>, LoraError> {
        if self.lora.is_some() {
            return Err(LoraError::Adapted);
        }
        if config.rank == 0 {
            return Err(LoraError::Rank);
        }
        if !(config.alpha > 0.0 && config.alpha.is_finite()) {
            return Err(LoraError::Alpha(config.alpha));
        }
        let all = self.projections();
        let known: BTreeSet<&String> = all.iter().map(|(_, name, _)| name).collect();
        let listed = || known.iter().map(|&name| name.clone()).collect();
        if config.targets.is_empty() {
            return Err(LoraError::NoTargets(listed()));
        }
        let unknown = |target: &&String| !known.iter().any(|name| names(target, name));
        if let Some(target) = config.targets.iter().find(unknown) {
            return Err(LoraError::UnknownTarget {
                target: target.clone(),
                known: listed(),
            });
        }
        let selected = all.into_iter();
        let selected = selected.filter(|(_, name, _)| config.selects(name));
        Ok(selected
            .map(|(layer, name, projection)| (layer, name, projection.weight.dims()))
            .collect())
    }

    /// The projections of its layers that have adapters, with the layer and the name in it.
    #[cfg(any(feature = "checkpoint", feature = "train"))]
    pub(crate) fn adapters(&self) -> Vec<(usize, String, &Lora<B>)> {
        let all = self.projections().into_iter();
        all.filter_map(|(layer, name, projection)| Some((layer, name, projection.lora.as_ref()?)))
            .collect()
    }

    /// A function of every one of [`adapters`](Self::adapters).
    #[cfg(any(feature = "checkpoint", feature = "train"))]
    pub(crate) fn try_for_each_adapter<E>(
        &mut self,
        mut f: impl FnMut(usize, &str, &mut Lora<B>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.try_for_each_projection(|layer, name, projection| match &mut projection.lora {
            Some(lora) => f(layer, name, lora),
            None => Ok(()),
        })
    }
}
