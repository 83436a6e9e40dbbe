//! Plans and configurations: what is refused, what survives JSON, and whether reported costs are
//! what the built model has.

use burn::config::Config;
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use fusedkv::config::{LayerKind, RopeScaling};
use fusedkv::{
    BlendWeights, BlockConfig, ConfigError, FusedKvDecoderConfig, FusionInit, FusionStart, KvPart,
    KvPlan, KvSource, LayerKv, Logits, PlanError, TokenBatch,
};
use proptest::prelude::*;
use serde_json::json;

use crate::models::{F64, VOCAB, any_case, plans, small, values};

fn layer(key: KvSource, value: KvSource) -> LayerKv {
    LayerKv { key, value }
}

#[test]
fn plans_nobody_can_follow_are_refused() {
    let store = || LayerKv::OWN;
    let blend = |sources: &[usize]| KvSource::Blend {
        sources: sources.to_vec(),
        weights: BlendWeights::PerChannel,
    };
    let custom = |layers: Vec<LayerKv>| {
        let n = layers.len();
        KvPlan::Custom { layers }.resolve(n).unwrap_err()
    };
    let as_is = KvSource::AsIs;
    let own = |residual| KvSource::Own { residual };
    for (layers, expected) in [
        (vec![], PlanError::NoLayers),
        (
            vec![layer(as_is(0), as_is(0))],
            PlanError::SourceNotBelow {
                part: KvPart::Key,
                reader: 0,
                layer: 0,
            },
        ),
        (
            vec![store(), layer(as_is(2), as_is(0)), store()],
            PlanError::SourceNotBelow {
                part: KvPart::Key,
                reader: 1,
                layer: 2,
            },
        ),
        (
            vec![
                store(),
                layer(as_is(0), as_is(0)),
                layer(as_is(0), as_is(1)),
            ],
            PlanError::SourceDoesNotStore {
                part: KvPart::Value,
                reader: 2,
                layer: 1,
            },
        ),
        (
            vec![store(), layer(blend(&[]), as_is(0))],
            PlanError::EmptyBlend {
                part: KvPart::Key,
                reader: 1,
            },
        ),
        (
            vec![store(), layer(as_is(0), blend(&[0, 0]))],
            PlanError::DuplicateSource {
                part: KvPart::Value,
                reader: 1,
                layer: 0,
            },
        ),
        (
            vec![store(), layer(own(Some(1)), own(Some(0)))],
            PlanError::SourceNotBelow {
                part: KvPart::Key,
                reader: 1,
                layer: 1,
            },
        ),
        (
            vec![store(), layer(own(None), blend(&[0, 2])), store()],
            PlanError::SourceNotBelow {
                part: KvPart::Value,
                reader: 1,
                layer: 2,
            },
        ),
        // Keys and values are stored apart.
        (
            vec![
                store(),
                layer(own(None), as_is(0)),
                layer(as_is(1), as_is(1)),
            ],
            PlanError::SourceDoesNotStore {
                part: KvPart::Value,
                reader: 2,
                layer: 1,
            },
        ),
        (
            vec![
                store(),
                layer(own(None), as_is(0)),
                layer(own(Some(1)), own(Some(1))),
            ],
            PlanError::SourceDoesNotStore {
                part: KvPart::Value,
                reader: 2,
                layer: 1,
            },
        ),
    ] {
        assert_eq!(custom(layers), expected);
    }
    let short = KvPlan::Custom {
        layers: vec![store()],
    };
    assert_eq!(
        short.resolve(2),
        Err(PlanError::LayerCount {
            plan: 1,
            n_layers: 2
        })
    );
    for n in [0, 1, 4, 9] {
        let refused = KvPlan::FusedKv { storage_layers: n }.resolve(4);
        assert!(
            matches!(refused, Err(PlanError::StorageLayers { min: 2, storage_layers, .. }) if storage_layers == n)
        );
    }
    for n in [0, 4] {
        let refused = KvPlan::Yoco { storage_layers: n }.resolve(4);
        assert!(matches!(
            refused,
            Err(PlanError::StorageLayers { min: 1, .. })
        ));
    }
    for factor in [0, 5] {
        let refused = KvPlan::Cla { factor }.resolve(4);
        assert_eq!(
            refused,
            Err(PlanError::ClaFactor {
                factor,
                n_layers: 4
            })
        );
    }
    let unknown = KvPlan::from_method("mla", 4);
    assert_eq!(unknown, Err(PlanError::UnknownMethod("mla".into())));
}

/// Four layers, of which `change` makes the third another.
fn kinds(change: fn(&mut LayerKind)) -> Vec<LayerKind> {
    let mut kinds = vec![LayerKind::default(); 4];
    change(&mut kinds[2]);
    kinds
}

#[test]
fn configurations_nobody_can_build_are_refused() {
    let good = small(KvPlan::Standard);
    let refused = |change: fn(&mut FusedKvDecoderConfig)| {
        let mut config = good.clone();
        change(&mut config);
        assert_eq!(config.costs().err(), config.validate().err());
        config
            .init::<F64>(&Default::default())
            .expect_err("refused")
    };
    assert_eq!(
        refused(|c| c.vocab_size = 0),
        ConfigError::Zero {
            field: "vocab_size"
        }
    );
    assert_eq!(
        refused(|c| c.n_kv_heads = 0),
        ConfigError::Zero {
            field: "n_kv_heads"
        }
    );
    assert_eq!(
        refused(|c| c.max_positions = 0),
        ConfigError::Zero {
            field: "max_positions"
        }
    );
    assert_eq!(
        refused(|c| c.n_kv_heads = 3),
        ConfigError::HeadGroups {
            n_heads: 4,
            n_kv_heads: 3
        }
    );
    assert_eq!(refused(|c| c.head_dim = 5), ConfigError::OddHeadDim(5));
    let range = |error| match error {
        ConfigError::Range { field, .. } => field,
        other => panic!("{other}"),
    };
    assert_eq!(range(refused(|c| c.rope_theta = 0.0)), "rope_theta");
    assert_eq!(range(refused(|c| c.rms_norm_eps = -1.0)), "rms_norm_eps");
    assert_eq!(range(refused(|c| c.dropout = 1.0)), "dropout");
    assert_eq!(range(refused(|c| c.init_std = -1.0)), "init_std");
    assert_eq!(
        range(refused(|c| c.fusion_init.noise = f64::INFINITY)),
        "fusion_init.noise"
    );
    assert_eq!(
        range(refused(|c| c.fusion_init.residual = f64::INFINITY)),
        "fusion_init.residual"
    );
    for (field, change) in [
        (
            "block.layers.head_dim",
            (|c| c.block.layers = kinds(|kind| kind.head_dim = Some(0)))
                as fn(&mut FusedKvDecoderConfig),
        ),
        ("block.layers.n_kv_heads", |c| {
            c.block.layers = kinds(|kind| kind.n_kv_heads = Some(0));
        }),
        ("block.layer_input_size", |c| {
            c.block.layer_input_size = Some(0);
        }),
        ("block.ffn_sizes", |c| {
            c.block.ffn_sizes = vec![10, 10, 0, 10]
        }),
    ] {
        assert_eq!(refused(change), ConfigError::Zero { field });
    }
    assert_eq!(
        refused(|c| c.block.layers = kinds(|kind| kind.n_kv_heads = Some(3))),
        ConfigError::HeadGroups {
            n_heads: 4,
            n_kv_heads: 3
        }
    );
    assert_eq!(
        refused(|c| c.block.layers = kinds(|kind| kind.head_dim = Some(7))),
        ConfigError::OddHeadDim(7)
    );
    let found = 3;
    let count = |field| ConfigError::LayerCount {
        field,
        found,
        n_layers: 4,
    };
    let found_layers = refused(|c| c.block.layers = vec![LayerKind::default(); 3]);
    assert_eq!(found_layers, count("block.layers"));
    let found_sizes = refused(|c| c.block.ffn_sizes = vec![10; 3]);
    assert_eq!(found_sizes, count("block.ffn_sizes"));
    assert_eq!(
        range(refused(|c| c.block.rope_scaling =
            RopeScaling::Proportional {
                rotated: 1.5,
                factor: 1.0
            })),
        "rope rotated"
    );
    // The lowest layer alone is of another kind, and the second reads it.
    for change in [
        |kind: &mut LayerKind| kind.head_dim = Some(6),
        |kind: &mut LayerKind| kind.n_kv_heads = Some(1),
        |kind: &mut LayerKind| kind.k_eq_v = true,
    ] {
        let mut config = good.clone();
        config.block.layers = vec![LayerKind::default(); 4];
        change(&mut config.block.layers[0]);
        let read = KvSource::AsIs(0);
        let mut layers = vec![LayerKv::OWN; 4];
        layers[1] = layer(read.clone(), read);
        config.plan = KvPlan::Custom { layers };
        let another = PlanError::SourceOfAnotherKind {
            part: KvPart::Key,
            reader: 1,
            layer: 0,
        };
        assert_eq!(config.validate().unwrap_err(), another.into());
    }
    let plan = refused(|c| c.plan = KvPlan::Cla { factor: 0 });
    assert_eq!(
        plan,
        ConfigError::Plan(PlanError::ClaFactor {
            factor: 0,
            n_layers: 4
        })
    );
}

#[test]
fn plans_read_as_checkpoints_spell_them() {
    let read = |json: &str| serde_json::from_str::<KvPlan>(json).unwrap();
    let fused = read(r#"{"method": "fused_kv", "storage_layers": 8}"#);
    assert_eq!(fused, KvPlan::FusedKv { storage_layers: 8 });
    assert_eq!(
        read(r#"{"method": "cla", "factor": 3}"#),
        KvPlan::Cla { factor: 3 }
    );
    assert_eq!(
        read(r#"{"method": "standard", "storage_layers": 8}"#),
        KvPlan::Standard
    );
    // Keys and values apart, and layers as they were written before.
    let custom = read(
        r#"{"method": "custom", "layers": [
            {"store": {}},
            {"key": "own", "value": {"as_is": 0}},
            {"key": {"own": {"residual": 0}}, "value": "own"},
            {"reuse": {"key": {"as_is": 1},
                       "value": {"blend": {"sources": [0, 2], "weights": "per_layer"}}}},
            {"store": {"residual": 2}}
        ]}"#,
    );
    let KvPlan::Custom { layers } = &custom else {
        panic!("{custom:?}");
    };
    let own = |residual| KvSource::Own { residual };
    let blend = KvSource::Blend {
        sources: vec![0, 2],
        weights: BlendWeights::PerLayer,
    };
    let expected = [
        LayerKv::OWN,
        layer(KvSource::OWN, KvSource::AsIs(0)),
        layer(own(Some(0)), KvSource::OWN),
        layer(KvSource::AsIs(1), blend),
        layer(own(Some(2)), own(Some(2))),
    ];
    assert_eq!(layers[..], expected);
    let json = serde_json::to_value(&custom).unwrap();
    assert_eq!(json["layers"][0], serde_json::json!({ "store": {} }));
    assert_eq!(json["layers"][1]["key"], "own");
    for (json, named) in [
        (
            r#"{"method": "yoco", "storage_layers": 2, "factor": 2}"#,
            "factor",
        ),
        (
            r#"{"method": "yoco", "storage_layers": 2, "kv_heads": 2}"#,
            "kv_heads",
        ),
        (
            r#"{"method": "cla", "factor": 2, "storage_layers": 2}"#,
            "storage_layers",
        ),
        (r#"{"method": "cla"}"#, "factor"),
        (
            r#"{"method": "custom", "layers": [], "storage_layers": 2}"#,
            "storage_layers",
        ),
        (
            r#"{"method": "custom", "layers": [{"reuse": {"key": "own", "value": "own"}}]}"#,
            "`key` and `value`",
        ),
        (r#"{"method": "custom"}"#, "layers"),
        (
            r#"{"method": "custom", "layers": [{}]}"#,
            "`key` and `value`",
        ),
        (
            r#"{"method": "custom", "layers": [{"key": "own"}]}"#,
            "`key` and `value`",
        ),
        (
            r#"{"method": "custom", "layers": [{"store": {}, "key": "own", "value": "own"}]}"#,
            "`key` and `value`",
        ),
        (
            r#"{"method": "custom", "layers": [{"key": "mine", "value": "own"}]}"#,
            "own",
        ),
        (
            r#"{"method": "custom", "layers": [{"key": {"of": 1}, "value": "own"}]}"#,
            "of",
        ),
        (r#"{"method": "magic"}"#, "magic"),
    ] {
        let error = serde_json::from_str::<KvPlan>(json)
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{json}: {error}");
    }
    for plan in plans(5) {
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(read(&json), plan, "{json}");
        assert!(
            json.contains(&format!("\"method\":\"{}\"", plan.method())),
            "{json}"
        );
    }
    for method in KvPlan::methods() {
        assert_eq!(KvPlan::from_method(method, 8).unwrap().method(), method);
    }
}

#[test]
fn configuration_survives_json() {
    let plan = KvPlan::from_method("dense_fusion", 6).unwrap();
    let config = FusedKvDecoderConfig::tiny(300, plan)
        .with_tie_embeddings(false)
        .with_fusion_init(FusionInit::equal().with_noise(0.125).with_residual(-0.5));
    let file = tempfile::NamedTempFile::new().unwrap();
    config.save(file.path()).unwrap();
    assert_eq!(FusedKvDecoderConfig::load(file.path()).unwrap(), config);

    // A block is written as it was before layers had widths of their own, and values norms.
    let mut block = BlockConfig::default();
    assert_eq!(serde_json::to_string(&block).unwrap(), "null");
    block.qkv_bias = true;
    block.layers = vec![LayerKind {
        window: Some(3),
        ..LayerKind::default()
    }];
    let json = serde_json::to_value(&block).unwrap();
    assert_eq!(json.as_object().unwrap().len(), 15);
    assert_eq!(json["layers"], json!([{ "window": 3, "rope": null }]));
    block.ffn_sizes = vec![5];
    block.layer_input_size = Some(2);
    (block.value_norm, block.layer_scalar) = (true, true);
    block.layers[0].k_eq_v = true;
    block.layers[0].head_dim = Some(6);
    let json = serde_json::to_value(&block).unwrap();
    assert_eq!(serde_json::from_value::<BlockConfig>(json).unwrap(), block);

    // As it was written before α had a start, and still is where that is 0.
    let init = r#"{"start":"Equal","noise":0.125}"#;
    let read: FusionInit = serde_json::from_str(init).unwrap();
    assert_eq!(read, FusionInit::equal().with_noise(0.125));
    assert_eq!(serde_json::to_string(&read).unwrap(), init);
}

#[test]
fn fusion_weights_start_where_they_are_told() {
    let weights = |init: FusionInit| {
        let plan = KvPlan::FusedKv { storage_layers: 3 };
        let config = small(plan);
        let model = config
            .with_fusion_init(init)
            .init::<F64>(&Default::default())
            .unwrap();
        let [key, value] = ["key", "value"].map(|part| {
            let name = format!("model.layers.3.self_attn.kv_fusion.{part}_weight");
            model.parameter::<3>(&name).unwrap()
        });
        assert_eq!((key.dims(), value.dims()), ([2, 2, 2], [2, 2, 4]));
        (values(&key), values(&value))
    };
    let (key, value) = weights(FusionInit::lite());
    assert_eq!(key, [[0.0; 4], [1.0; 4]].concat());
    assert_eq!(value, [[1.0; 8], [0.0; 8]].concat());
    let (key, value) = weights(FusionInit::equal());
    assert!(key.iter().chain(&value).all(|&w| w == 0.5));
    let (key, _) = weights(FusionInit::new(FusionStart::Equal).with_noise(0.1));
    assert!(key.iter().all(|w| (w - 0.5).abs() < 1.0) && key.iter().any(|&w| w != 0.5));

    for start in [0.0, 0.25] {
        let plan = KvPlan::YocoPlusPlus { storage_layers: 3 };
        let model = small(plan)
            .with_fusion_init(FusionInit::lite().with_residual(start))
            .init::<F64>(&Default::default())
            .unwrap();
        for part in ["key", "value"] {
            let name = format!("model.layers.1.self_attn.kv_residual.{part}_weight");
            assert_eq!(values(&model.parameter::<1>(&name).unwrap()), [start]);
        }
    }
}

#[test]
fn presets_have_the_sizes_they_are_named_for() {
    type Preset = fn(&dyn Fn(usize) -> KvPlan) -> FusedKvDecoderConfig;
    let presets: [(Preset, f64); 4] = [
        (|plan| FusedKvDecoderConfig::b0_332(plan), 332e6),
        (|plan| FusedKvDecoderConfig::b0_65(plan), 650e6),
        (|plan| FusedKvDecoderConfig::b1_5(plan), 1.5e9),
        (|plan| FusedKvDecoderConfig::b4(plan), 4e9),
    ];
    for (preset, size) in presets {
        for method in KvPlan::methods() {
            let config = preset(&|n| KvPlan::from_method(method, n).unwrap());
            let found = config.costs().unwrap().parameters() as f64;
            assert!(
                (found / size - 1.0).abs() < 0.03,
                "{method} {size}: {found}"
            );
        }
    }
}

fn n_sources(source: &KvSource) -> usize {
    match source {
        KvSource::Blend { sources, .. } => sources.len(),
        _ => 1,
    }
}

/// Sizes of all matrices by layer, read off a built model.
#[derive(Default)]
struct Matrices {
    path: Vec<String>,
    parameters: usize,
    /// Elements of the projection that gives layers something of the tokens.
    inputs: usize,
    /// Per layer, elements of k and v projections, and of the other projections.
    layers: Vec<(usize, usize)>,
}

impl ModuleVisitor<F64> for Matrices {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }
    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<F64, D>>) {
        let n = param.val().shape().num_elements();
        self.parameters += n;
        if self.path[0] == "per_layer_model_projection" {
            self.inputs = n;
        }
        let [first, layer, .., projection, _] = self.path.as_slice() else {
            return;
        };
        // In layers, all matrices are projections.
        if first != "layers" || D != 2 {
            return;
        }
        let layer: usize = layer.parse().unwrap();
        self.layers.resize(self.layers.len().max(layer + 1), (0, 0));
        match projection.as_str() {
            "k_proj" | "v_proj" => self.layers[layer].0 += n,
            _ => self.layers[layer].1 += n,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn reported_costs_are_the_built_models(mut case in any_case(1..8)) {
        // What windows save is counted by the products that are asked for, in `cost`.
        case.config.block.layers.clear();
        let config = &case.config;
        let costs = config.costs().unwrap();
        let model = case.model::<F64>();
        let mut built = Matrices::default();
        model.visit(&mut built);
        prop_assert_eq!(costs.parameters(), built.parameters);
        prop_assert_eq!(costs.parameters(), model.num_params());

        let (rows, seq) = (case.tokens.len(), case.tokens[0].len());
        let mut cache = model.new_cache(rows, seq).unwrap();
        prop_assert_eq!(costs.cache_bytes_per_token(8) * rows * seq, cache.bytes_allocated());
        let batch = TokenBatch::from_rows(&case.tokens, VOCAB, &Default::default()).unwrap();
        model.forward_cached(batch, &mut cache, Logits::Last).unwrap();

        // Bytes read: sizes of the cached tensors each layer attends to.
        let layout = model.layout();
        let tensor = values(&cache.get(KvPart::Key, 0).unwrap()).len() * 8 / rows;
        let tensors = |layer: usize| {
            let LayerKv { key, value } = layout.layer(layer);
            n_sources(key) + n_sources(value)
        };
        let read: usize = (0..config.n_layers).map(|layer| tensors(layer) * tensor).sum();
        prop_assert_eq!(costs.cache_bytes_read_per_token(seq, 8), read);

        // FLOPs: two per element of each matrix and position it is applied to, and per channel of
        // each tensor attended to, query head and visible key.
        let top = (0..config.n_layers).rev().find(|&l| built.layers[l].0 > 0).unwrap();
        let q_width = config.n_heads * config.head_dim;
        let head = config.vocab_size * config.hidden_size;
        let mut prefill = 2 * head;
        let mut decode = 2 * head;
        for (layer, &(kv, other)) in built.layers.iter().enumerate() {
            let other = other + built.inputs / config.n_layers;
            let visible: usize = match layer < top {
                true => (1..=seq).sum(),
                false => seq,
            };
            let positions = if layer < top { seq } else { 1 };
            prefill += 2 * (kv * seq + other * positions + visible * tensors(layer) * q_width);
            decode += 2 * (kv + other + seq * tensors(layer) * q_width);
        }
        prop_assert_eq!(costs.prefill_flops(seq), prefill);
        prop_assert_eq!(costs.decode_flops(seq), decode);
    }
}
