//! The formula that gives every parameter a value by its checkpoint name, every plan, the numbers of
//! a tensor, and how far numbers are off.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use fusedkv::{BlendWeights, FusedKvDecoder, FusedKvDecoderConfig, KvPlan, KvSource, LayerKv};

/// A decoder of `config` with the values of [`uniform`] on `device`.
pub fn model_on<B: Backend>(
    config: &FusedKvDecoderConfig,
    seed: u64,
    device: &B::Device,
) -> FusedKvDecoder<B> {
    let model = config.init::<B>(device).unwrap();
    model.map(&mut ByName {
        seed: seed.wrapping_mul(0x2545_F491_4F6C_DD1D),
        path: vec![],
    })
}

/// Every plan of `n_layers` layers: the methods, each number of storing layers, and two custom ones.
pub fn plans(n_layers: usize) -> Vec<KvPlan> {
    let mut plans = vec![KvPlan::Standard, custom(n_layers), apart(n_layers)];
    plans.extend((1..=n_layers).map(|factor| KvPlan::Cla { factor }));
    for storage_layers in 1..n_layers {
        plans.extend([
            KvPlan::FusedKvLite { storage_layers },
            KvPlan::FusedKvLiteLearnable { storage_layers },
            KvPlan::FusedKvLiteReversed { storage_layers },
            KvPlan::Yoco { storage_layers },
            KvPlan::YocoPlusPlus { storage_layers },
            KvPlan::DenseFusion { storage_layers },
        ]);
        if storage_layers > 1 {
            plans.push(KvPlan::FusedKv { storage_layers });
        }
    }
    plans
}

/// Stores at even layers, the upper ones with a residual; odd layers blend all stored below for
/// keys and take the nearest value.
fn custom(n_layers: usize) -> KvPlan {
    let layers = (0..n_layers)
        .map(|layer| match layer % 2 {
            0 => {
                let residual = (layer > 0).then(|| layer - 2);
                LayerKv {
                    key: KvSource::Own { residual },
                    value: KvSource::Own { residual },
                }
            }
            _ => LayerKv {
                key: KvSource::Blend {
                    sources: (0..layer).rev().filter(|l| l % 2 == 0).collect(),
                    weights: BlendWeights::PerChannel,
                },
                value: KvSource::AsIs(layer - 1),
            },
        })
        .collect();
    KvPlan::Custom { layers }
}

/// Keys and values apart: some of a layer's own, to which the bottom's are added, beside some that it
/// blends with its own or with others', and on top a layer that stores nothing.
pub fn apart(n_layers: usize) -> KvPlan {
    let own = KvSource::Own { residual: Some(0) };
    let blend = |sources, weights| KvSource::Blend { sources, weights };
    let layers = (0..n_layers)
        .map(|layer| match layer % 4 {
            _ if layer == 0 => LayerKv::OWN,
            _ if layer > 1 && layer + 1 == n_layers => LayerKv {
                key: blend(vec![1, 0], BlendWeights::PerLayer),
                value: KvSource::AsIs(0),
            },
            1 => LayerKv {
                key: own.clone(),
                value: blend(vec![layer, 0], BlendWeights::PerChannel),
            },
            2 => LayerKv {
                key: blend(vec![0, layer], BlendWeights::PerChannel),
                value: own.clone(),
            },
            _ => LayerKv {
                key: KvSource::AsIs(1),
                value: KvSource::OWN,
            },
        })
        .collect();
    KvPlan::Custom { layers }
}

/// Element `i` of the parameter a checkpoint calls `name`, in [−1, 1): splitmix64 seeded by the
/// FNV-1a hash of the name.
fn uniform(name: &str, seed: u64, i: usize) -> f64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let mut z = (hash ^ seed).wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    2.0 * ((z >> 11) as f64 / (1u64 << 53) as f64) - 1.0
}

/// Sets every parameter by the checkpoint name it will have.
struct ByName {
    seed: u64,
    path: Vec<String>,
}

impl ByName {
    fn name(&self) -> String {
        let path = self.path.join(".");
        let path = path.replace(".gamma", ".weight");
        match path.starts_with("lm_head") {
            true => path,
            false => format!("model.{path}"),
        }
    }
}

impl<B: Backend> ModuleMapper<B> for ByName {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let name = self.name();
        param.map(|old| {
            let dims = old.dims();
            let linear = ["_proj", "_gate.", "lm_head."]
                .iter()
                .any(|part| name.contains(part));
            // Burn keeps Linear weights [in, out]; checkpoints, and the formula, [out, in].
            let element = |i: usize| match linear {
                true => (i % dims[D - 1]) * dims[0] + i / dims[D - 1],
                false => i,
            };
            let values: Vec<f64> = (0..old.shape().num_elements())
                .map(|i| {
                    let v = uniform(&name, self.seed, element(i));
                    if name.contains("norm") || name.ends_with("layer_scalar") {
                        1.0 + 0.3 * v
                    } else if name.contains("kv_fusion") || name.contains("kv_residual") {
                        0.5 + 0.5 * v
                    } else if linear {
                        v * (3.0 / dims[0] as f64).sqrt()
                    } else {
                        v
                    }
                })
                .collect();
            Tensor::from_data(TensorData::new(values, dims), &old.device()).require_grad()
        })
    }
}

/// The numbers of a tensor, row by row.
pub fn values<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

/// Largest absolute difference, relative to the largest expected number; infinite where anything is
/// not a number.
pub fn off(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
    let errors = found.iter().zip(expected);
    let errors = errors.map(|(x, y)| (x - y).abs() / scale);
    // `f64::max` alone would pass over what is not a number.
    errors.fold(0f64, |max, x| match x.is_nan() {
        true => f64::INFINITY,
        false => max.max(x),
    })
}
