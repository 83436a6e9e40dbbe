//! The norm of all gradients together, and of each layer's.

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use serde::{Deserialize, Serialize};

use super::number;
use super::precision::at_least_f32;
use crate::kernels::{scaled, sum_of_squares};

/// The module of a decoder whose children are its layers.
const LAYERS: &str = "layers";

/// Norms of a step's gradients before they are clipped: the root of the sum of all squares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GradientNorms {
    /// Of all gradients, which is what is clipped.
    #[serde(with = "number")]
    pub all: f64,
    /// Of the parameters of each decoder layer, bottom layer first.
    #[serde(with = "number::list")]
    pub layers: Vec<f64>,
}

impl GradientNorms {
    pub(super) fn plus(self, other: &Self) -> Self {
        let layers = self.layers.iter().zip(&other.layers);
        Self {
            all: self.all + other.all,
            layers: layers.map(|(a, b)| a + b).collect(),
        }
    }

    pub(super) fn divided_by(self, divisor: f64) -> Self {
        Self {
            all: self.all / divisor,
            layers: self.layers.iter().map(|norm| norm / divisor).collect(),
        }
    }
}

/// Sums of squares: of what is in no layer, then layer by layer.
#[derive(Clone, Debug)]
pub(super) struct Squares<B: Backend>(Tensor<B, 1>);

impl<B: Backend> Squares<B> {
    /// Of the gradients of a module; none if it has none.
    pub fn of<A, M>(module: &M, grads: &GradientsParams) -> Option<Self>
    where
        A: AutodiffBackend<InnerBackend = B>,
        M: AutodiffModule<A>,
    {
        let mut sums = SumSquares::<A> {
            grads,
            path: Vec::new(),
            sums: Vec::new(),
        };
        module.visit(&mut sums);
        let device = sums.sums.iter().flatten().next()?.device();
        let sums = sums.sums.into_iter();
        let sums = sums.map(|sum| sum.unwrap_or_else(|| Tensor::zeros([1], &device)));
        Some(Self(Tensor::cat(sums.collect(), 0)))
    }

    /// The numbers; waits for the device.
    pub fn norms(self) -> GradientNorms {
        let squares: Vec<f64> = self.0.into_data().iter().collect();
        GradientNorms {
            all: squares.iter().sum::<f64>().sqrt(),
            layers: squares.iter().skip(1).map(|square| square.sqrt()).collect(),
        }
    }
}

/// Scales all gradients by one factor where their norm exceeds the largest allowed (arXiv
/// 1211.5063). Burn's own clipping takes the norm of each tensor alone.
pub(super) fn clip_to_norm<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    grads: &mut GradientsParams,
    squares: &Squares<B::InnerBackend>,
    max_norm: f64,
) {
    // A tensor, not a number: nobody waits for the device.
    let factor = (squares.0.clone().sum().sqrt() + 1e-6)
        .recip()
        .mul_scalar(max_norm)
        .clamp_max(1.0);
    scale(module, grads, factor);
}

/// The gradients of what trains of a module, in f32 at least, before they are added up and squared.
///
/// Burn's own look at every parameter's numbers, to which a matrix in fewer bits must be widened.
pub(super) fn gradients<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    gradients: B::Gradients,
) -> GradientsParams {
    let mut of_trained = OfTrained::<B> {
        gradients,
        found: GradientsParams::new(),
    };
    module.visit(&mut of_trained);
    of_trained.found
}

/// Multiplies all gradients by a factor, `[1]`.
pub(super) fn scale<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    grads: &mut GradientsParams,
    factor: Tensor<B::InnerBackend, 1>,
) {
    module.visit(&mut Scale::<B> { grads, factor });
}

struct SumSquares<'g, B: AutodiffBackend> {
    grads: &'g GradientsParams,
    /// Names of the modules around the parameter visited.
    path: Vec<String>,
    sums: Vec<Option<Tensor<B::InnerBackend, 1>>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for SumSquares<'_, B> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let place = match &self.path[..] {
            [module, layer, ..] if module == LAYERS => layer.parse().map_or(0, |i: usize| i + 1),
            _ => 0,
        };
        if self.sums.len() <= place {
            self.sums.resize(place + 1, None);
        }
        // Parameters that do not train have none.
        let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) else {
            return;
        };
        let square = sum_of_squares(grad);
        self.sums[place] = Some(match self.sums[place].take() {
            Some(sum) => sum + square,
            None => square,
        });
    }
}

struct OfTrained<B: AutodiffBackend> {
    gradients: B::Gradients,
    found: GradientsParams,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for OfTrained<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        // A parameter that a pass has used is; a matrix in fewer bits is none.
        if !param.is_initialized() || !param.is_require_grad() {
            return;
        }
        if let Some(gradient) = param.val().grad_remove(&mut self.gradients) {
            let dtype = at_least_f32(gradient.dtype());
            self.found.register(param.id, gradient.cast(dtype));
        }
    }
}

struct Scale<'g, B: AutodiffBackend> {
    grads: &'g mut GradientsParams,
    factor: Tensor<B::InnerBackend, 1>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Scale<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            self.grads.register(param.id, scaled(grad, &self.factor));
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Distribution, Int};
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::train::small_decoder;
    use crate::{FusedKvDecoder, KvPlan};

    type Train = Autodiff<Flex>;

    fn norm(max_norm: f64) -> f64 {
        let layer: Linear<Train> = LinearConfig::new(3, 2).init(&FlexDevice);
        let input = Tensor::<Train, 2>::ones([4, 3], &FlexDevice);
        let loss = layer.forward(input).sum();
        let mut grads = GradientsParams::from_grads(loss.backward(), &layer);
        let squares = Squares::of(&layer, &grads).unwrap();
        clip_to_norm(&layer, &mut grads, &squares, max_norm);
        Squares::of(&layer, &grads).unwrap().norms().all
    }

    #[test]
    fn all_gradients_share_one_norm() {
        // Weight gradients are 4 each, 6 of them; bias gradients 4 each, 2 of them.
        assert!((norm(1e9) - 128f64.sqrt()).abs() < 1e-4);
        assert!((norm(2.0) - 2.0).abs() < 1e-4);
    }

    #[test]
    fn layers_have_the_norm_of_their_own_parameters() {
        let plan = KvPlan::FusedKv { storage_layers: 2 };
        let config = small_decoder(plan);
        let model: FusedKvDecoder<Train> = config.init(&FlexDevice).unwrap();
        let tokens =
            Tensor::<Train, 2, Int>::random([2, 9], Distribution::Uniform(0.0, 32.0), &FlexDevice);
        let loss = model.forward(tokens).unwrap().powi_scalar(2).mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        let norms = Squares::of(&model, &grads).unwrap().norms();

        // A layer is a module by itself.
        let squares = |norms: GradientNorms| norms.all.powi(2);
        let layers: Vec<f64> = model
            .layers
            .iter()
            .map(|layer| squares(Squares::of(layer, &grads).unwrap().norms()))
            .collect();
        assert_eq!(norms.layers.len(), 4);
        for (found, expected) in norms.layers.iter().zip(&layers) {
            assert!(
                (found.powi(2) - expected).abs() < 1e-5 * expected,
                "{found} {expected}"
            );
        }
        let outside = Squares::of(&model.embed_tokens, &grads).unwrap().norms();
        let norm = Squares::of(&model.norm, &grads).unwrap().norms();
        let expected = layers.iter().sum::<f64>() + squares(outside) + squares(norm);
        let all = squares(norms);
        assert!((all - expected).abs() < 1e-5 * expected, "{all} {expected}");
    }
}
