//! What a configuration costs: parameters, cache bytes, bytes read, FLOPs.

use crate::config::{ConfigError, FusedKvDecoderConfig, LayerSpec};
use crate::parameters::{TensorSpec, tensors};
use crate::plan::{KvLayout, KvPart, Reach};

/// Costs of a decoder, derived from its configuration and plan alone.
///
/// FLOPs count two per multiply-add of the matrix products (projections, feed-forward, attention,
/// output head), for one row. A query attends to its own and earlier positions only, and a blend of k
/// sources is attended to without materialising it, as the cached path does: k products per key.
///
/// ```
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// let fused = FusedKvDecoderConfig::b1_5(|l| KvPlan::FusedKv { storage_layers: l / 2 });
/// let standard = FusedKvDecoderConfig::b1_5(|_| KvPlan::Standard);
/// let (fused, standard) = (fused.costs()?, standard.costs()?);
/// assert_eq!(2 * fused.cache_bytes_per_token(2), standard.cache_bytes_per_token(2));
/// # Ok::<(), fusedkv::ConfigError>(())
/// ```
#[derive(Clone, Debug)]
pub struct DecoderCosts {
    config: FusedKvDecoderConfig,
    layout: KvLayout,
}

impl FusedKvDecoderConfig {
    /// The costs of this configuration.
    ///
    /// # Errors
    /// [`ConfigError`] as [`validate`](Self::validate).
    pub fn costs(&self) -> Result<DecoderCosts, ConfigError> {
        Ok(DecoderCosts {
            layout: self.validate()?,
            config: self.clone(),
        })
    }
}

impl DecoderCosts {
    /// Number of learned parameters; a tied head counts once.
    pub fn parameters(&self) -> usize {
        let tensors = tensors(&self.config, &self.layout);
        tensors.iter().map(TensorSpec::elements).sum()
    }

    /// Bytes one token of one row takes in the cache, at `element_bytes` per element (4 for f32,
    /// 2 for f16 and bf16); in layers with a sliding window while the row is shorter than it.
    pub fn cache_bytes_per_token(&self, element_bytes: usize) -> usize {
        self.cache_bytes(1, element_bytes)
    }

    /// Cache bytes of the tokens that the token after `context` tokens of one row can see.
    pub fn cache_bytes(&self, context: usize, element_bytes: usize) -> usize {
        self.per_layer(|layer, spec| {
            self.stored(layer) * spec.visible(context) * spec.kv.width() * element_bytes
        })
    }

    /// Cache bytes that decoding one token of one row reads when `context` tokens are cached
    /// (itself included): every layer reads each stored tensor it attends to once.
    pub fn cache_bytes_read_per_token(&self, context: usize, element_bytes: usize) -> usize {
        self.per_layer(|layer, spec| {
            let reads = self.layout.n_reads(layer);
            reads * spec.visible(context) * spec.kv.width() * element_bytes
        })
    }

    fn per_layer(&self, cost: impl Fn(usize, &LayerSpec) -> usize) -> usize {
        let layers = (0..self.config.n_layers).map(|layer| cost(layer, &self.config.layer(layer)));
        layers.sum()
    }

    /// Tensors that a layer stores: keys, values or both.
    fn stored(&self, layer: usize) -> usize {
        let stored = KvPart::BOTH.map(|part| self.layout.stores(part, layer));
        stored.into_iter().filter(|&stored| stored).count()
    }

    /// FLOPs to prefill `prompt` tokens of one row into an empty cache and get the last one's
    /// logits, in one pass. Only positions that somebody reads are computed: above the highest
    /// storing layer, and in it past its keys and values, the last one; where layers have sliding
    /// windows, those that can be seen through them.
    pub fn prefill_flops(&self, prompt: usize) -> usize {
        self.flops(prompt, 0)
    }

    /// FLOPs to decode one token of one row that attends to `context` tokens, itself included.
    pub fn decode_flops(&self, context: usize) -> usize {
        self.flops(1, context.saturating_sub(1))
    }

    /// FLOPs of `tokens` new positions after `cached` ones, with the last position's logits.
    fn flops(&self, tokens: usize, cached: usize) -> usize {
        if tokens == 0 {
            return 0;
        }
        let c = &self.config;
        let head = c.vocab_size * c.hidden_size;
        let window = |layer| c.layer(layer).kind.window;
        let reach = Reach::of_layers(&self.layout, window, tokens, 1);
        let layers = self.per_layer(|layer, spec| {
            let Reach { stored, queries } = &reach[layer];
            // Pairs of query and key: position t sees t + 1 keys, or those of its window.
            let last = cached + tokens;
            let pairs: usize = (last - queries + 1..=last)
                .map(|keys| spec.visible(keys))
                .sum();
            let projected = match spec.kind.k_eq_v {
                true => stored.iter().copied().max().unwrap_or(0),
                false => stored.iter().sum(),
            };
            let kv = projected * c.hidden_size * spec.kv.width();
            // What a layer is given of the tokens is a product, its gate another, its output a third.
            let input = c.block.layer_input_size.unwrap_or(0);
            let trunk = c.hidden_size * (2 * spec.q_width() + 3 * (spec.ffn_size + input));
            kv + queries * trunk + pairs * spec.q_width() * self.layout.n_reads(layer)
        });
        2 * (layers + head)
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::{Flex, FlexDevice};
    use proptest::prelude::*;

    use crate::config::LayerKind;
    use crate::kernels::work::multiply_adds;
    use crate::{
        BlendWeights, FusedKvDecoderConfig, KvPlan, KvSource, LayerKv, Logits, TokenBatch,
    };

    /// All methods, and a plan that stores above a layer that reuses, keys and values apart.
    fn plans() -> Vec<KvPlan> {
        let mut plans: Vec<_> = KvPlan::methods()
            .map(|method| KvPlan::from_method(method, 5).unwrap())
            .collect();
        plans.extend((1..5).map(|storage_layers| KvPlan::Yoco { storage_layers }));
        let blend = |sources| KvSource::Blend {
            sources,
            weights: BlendWeights::PerChannel,
        };
        let layer = |key, value| LayerKv { key, value };
        let layers = vec![
            LayerKv::OWN,
            layer(KvSource::AsIs(0), blend(vec![0])),
            LayerKv::OWN,
            layer(KvSource::OWN, blend(vec![0, 2])),
            layer(blend(vec![0, 3]), blend(vec![2, 4])),
        ];
        plans.push(KvPlan::Custom { layers });
        plans
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// No position is computed that nobody reads, in one pass or in several.
        #[test]
        fn prefill_and_decoding_multiply_as_often_as_they_cost(
            plan in prop::sample::select(plans()),
            prompt in 1usize..40,
            chunk in 1usize..50,
            group in 1usize..3,
            input in prop::option::of(1usize..4),
        ) {
            let mut config = FusedKvDecoderConfig::new(13, plan)
                .with_hidden_size(12)
                .with_n_layers(5)
                .with_n_heads(2 * group)
                .with_n_kv_heads(2)
                .with_head_dim(6)
                .with_ffn_size(10);
            config.block.layer_input_size = input;
            let costs = config.costs().unwrap();
            let model = config.init::<Flex>(&FlexDevice).unwrap().with_prefill_chunk(chunk);
            let mut cache = model.new_cache(1, prompt + 1).unwrap();
            let mut read = |tokens: usize| {
                let tokens = vec![1; tokens];
                let batch = TokenBatch::from_rows(&[tokens], 13, &FlexDevice).unwrap();
                multiply_adds(|| {
                    model.forward_cached(batch, &mut cache, Logits::Last).unwrap();
                })
            };
            prop_assert_eq!(2 * read(prompt), costs.prefill_flops(prompt));
            prop_assert_eq!(2 * read(1), costs.decode_flops(prompt + 1));
        }

        /// Nor any that no window reaches.
        #[test]
        fn windows_are_computed_as_often_as_they_cost(
            method in prop::sample::select(KvPlan::methods().collect::<Vec<_>>()),
            windows in prop::collection::vec(prop::option::of(1usize..8), 5),
            same in any::<bool>(),
            global in (prop::option::of(1usize..5), prop::option::of(1usize..3), any::<bool>()),
            ffn_sizes in prop::collection::vec(1usize..20, 5),
            input in prop::option::of(1usize..4),
            prompt in 1usize..150,
        ) {
            let plan = KvPlan::from_method(method, 5).unwrap();
            let mut config = FusedKvDecoderConfig::new(13, plan)
                .with_hidden_size(12)
                .with_n_layers(5)
                .with_head_dim(6)
                .with_ffn_size(10);
            let (pairs, n_kv_heads, k_eq_v) = global;
            let kind = |window: &Option<usize>| match if same { windows[0] } else { *window } {
                None => LayerKind {
                    head_dim: pairs.map(|pairs| 2 * pairs),
                    n_kv_heads,
                    k_eq_v,
                    ..LayerKind::default()
                },
                window => LayerKind { window, ..LayerKind::default() },
            };
            config.block.layers = windows.iter().map(kind).collect();
            config.block.ffn_sizes = ffn_sizes;
            config.block.layer_input_size = input;
            let Ok(costs) = config.costs() else {
                // The method has a layer read of a kind that is not stored.
                return Ok(());
            };
            let model = config.init::<Flex>(&FlexDevice).unwrap();
            let mut cache = model.new_cache(1, prompt + 1).unwrap();
            for (tokens, cost) in [
                (prompt, costs.prefill_flops(prompt)),
                (1, costs.decode_flops(prompt + 1)),
            ] {
                let batch = TokenBatch::from_rows(&[vec![1; tokens]], 13, &FlexDevice).unwrap();
                let asked = multiply_adds(|| {
                    model.forward_cached(batch, &mut cache, Logits::Last).unwrap();
                });
                prop_assert_eq!(2 * asked, cost);
            }
        }
    }
}
