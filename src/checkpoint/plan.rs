//! The plans of models whose files say in their own words which layers share keys and values.

use serde_json::Value;

use super::error::CheckpointError;
use super::keys::Keys;
use crate::plan::{KvPlan, KvSource, LayerKv};

/// More than any model has: a larger number is a mistake.
pub(super) const MAX_LAYERS: usize = 1 << 16;

/// What files call the sharing of keys and values between layers.
const KEYS: &str = "one of `num_kv_shared_layers`, `num_kv_reuse_layers`, `use_cla` with \
                    `cla_share_factor`, `kv_reuse_group` and `shared_kv_layers`";

/// The plan that a configuration of another tool describes, `config.json` or the metadata of a GGUF
/// file; none if it says nothing of sharing.
///
/// | key | of | plan |
/// |---|---|---|
/// | `num_kv_shared_layers` k | Gemma 3n and 4 | [`KvPlan::Yoco`] with L − k storing layers: the upper k read the last store of their own kind |
/// | `num_kv_reuse_layers` k | Apple's models (arXiv 2507.13575) | the same |
/// | `shared_kv_layers` k, also behind `….attention.` | GGUF | the same |
/// | `cla_share_factor` c, if `use_cla` | Hunyuan-Large (arXiv 2411.02265) | [`KvPlan::Cla`] |
/// | `kv_reuse_group` | Hymba (arXiv 2411.13676) | [`KvPlan::Custom`]: in every group, the others read the first |
///
/// L is `num_hidden_layers`, `num_layers`, or a key that ends with `block_count`. Which kinds layers
/// are of is told by the decoder's configuration when the plan is
/// [resolved](KvPlan::resolve_kinds).
///
/// ```
/// use fusedkv::KvPlan;
/// use fusedkv::checkpoint::plan_of_config;
///
/// let config = serde_json::json!({ "num_hidden_layers": 30, "num_kv_shared_layers": 10 });
/// let plan = plan_of_config("config.json", &config)?;
/// assert_eq!(plan, Some(KvPlan::Yoco { storage_layers: 20 }));
/// # Ok::<(), fusedkv::checkpoint::CheckpointError>(())
/// ```
///
/// # Errors
/// [`CheckpointError::Setting`] naming `path`, the key and what was expected, if a number is none,
/// there are more layers than any model has, two keys contradict each other, or a layer is in two groups
/// or in none that there is.
pub fn plan_of_config(path: &str, config: &Value) -> Result<Option<KvPlan>, CheckpointError> {
    let map = config.as_object().ok_or_else(|| CheckpointError::Json {
        path: path.into(),
        reason: "expected an object".to_owned(),
    })?;
    let keys = Keys::of(path.into(), map.clone());
    let ending = |end: &str| {
        map.keys()
            .find(|key| key.ends_with(end))
            .map(String::as_str)
    };
    let shared_in_gguf = ending("shared_kv_layers").unwrap_or("shared_kv_layers");
    let mut plans = Vec::new();
    for key in [
        "num_kv_shared_layers",
        "num_kv_reuse_layers",
        shared_in_gguf,
    ] {
        if let Some(shared) = keys.optional_count(key)?.filter(|&shared| shared > 0) {
            let n_layers = n_layers(&keys, ending("block_count"))?;
            let (plan, _) = of_upper_layers(&keys, key, shared, n_layers)?;
            plans.push((key, plan));
        }
    }
    let factor = keys.optional_count("cla_share_factor")?;
    if keys.flag("use_cla")?.unwrap_or(false) {
        let factor = factor.filter(|&factor| factor > 0);
        let factor = factor.ok_or_else(|| keys.wrong("cla_share_factor", "at least 1"))?;
        plans.push(("cla_share_factor", KvPlan::Cla { factor }));
    }
    if keys.get("kv_reuse_group").is_some() {
        plans.push((
            "kv_reuse_group",
            of_groups(&keys, n_layers(&keys, ending("block_count"))?)?,
        ));
    }
    let Some((first, plan)) = plans.first().cloned() else {
        return Ok(None);
    };
    match plans.iter().find(|(_, other)| *other != plan) {
        None => Ok(Some(plan)),
        Some((key, _)) => Err(keys.wrong(key, format!("what `{first}` says, {KEYS}"))),
    }
}

/// The plan of which the upper `shared` layers, told by `key`, read the last store of their own kind,
/// and the number of the others.
pub(super) fn of_upper_layers(
    keys: &Keys,
    key: &str,
    shared: usize,
    n_layers: usize,
) -> Result<(KvPlan, usize), CheckpointError> {
    let fewer = || keys.wrong(key, format!("fewer than the {n_layers} layers"));
    let storage_layers = n_layers.checked_sub(shared).filter(|&n| n > 0);
    let storage_layers = storage_layers.ok_or_else(fewer)?;
    Ok((KvPlan::Yoco { storage_layers }, storage_layers))
}

/// The error for a number of layers above [`MAX_LAYERS`].
pub(super) fn too_many_layers(keys: &Keys, key: &str) -> CheckpointError {
    keys.wrong(key, format!("at most {MAX_LAYERS}"))
}

fn n_layers(keys: &Keys, in_gguf: Option<&str>) -> Result<usize, CheckpointError> {
    for key in ["num_hidden_layers", "num_layers"]
        .into_iter()
        .chain(in_gguf)
    {
        if let Some(n_layers) = keys.optional_count(key)? {
            if n_layers > MAX_LAYERS {
                return Err(too_many_layers(keys, key));
            }
            return Ok(n_layers);
        }
    }
    keys.count("num_hidden_layers")
}

/// A plan of groups of layers, of which the first stores and the others read it; layers in no group
/// store.
fn of_groups(keys: &Keys, n_layers: usize) -> Result<KvPlan, CheckpointError> {
    let key = "kv_reuse_group";
    let group = |group: &Value| -> Option<Vec<usize>> {
        let layers = group.as_array()?.iter();
        layers
            .map(|layer| usize::try_from(layer.as_u64()?).ok())
            .collect()
    };
    let groups = |value: &Value| {
        value
            .as_array()?
            .iter()
            .map(group)
            .collect::<Option<Vec<_>>>()
    };
    let groups = keys.optional(key, groups, "a list of lists of layers")?;
    let groups = groups.unwrap_or_default();
    let last = groups.iter().flatten().max();
    if last.is_some_and(|&last| last >= n_layers) {
        return Err(keys.wrong(key, format!("layers below {n_layers}")));
    }
    let mut layers = vec![None; n_layers];
    for group in &groups {
        let mut members = group.iter();
        let first = members.next().copied();
        let own = first.map(|first| (first, LayerKv::OWN)).into_iter();
        let others = members.filter_map(|&member| {
            let source = KvSource::AsIs(first?);
            let (key, value) = (source.clone(), source);
            Some((member, LayerKv { key, value }))
        });
        for (layer, kv) in own.chain(others) {
            if layers[layer].replace(kv).is_some() {
                return Err(keys.wrong(key, "every layer once"));
            }
        }
    }
    let layers = layers
        .into_iter()
        .map(|layer| layer.unwrap_or(LayerKv::OWN));
    Ok(KvPlan::Custom {
        layers: layers.collect(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(config: Value) -> Result<Option<KvPlan>, CheckpointError> {
        plan_of_config("config.json", &config)
    }

    #[test]
    fn plans_of_other_tools_are_read() {
        let yoco = |storage_layers| Some(KvPlan::Yoco { storage_layers });
        for (config, expected) in [
            (json!({ "num_hidden_layers": 4 }), None),
            (
                json!({ "num_hidden_layers": 4, "num_kv_shared_layers": 0 }),
                None,
            ),
            (
                json!({ "num_hidden_layers": 8, "num_kv_shared_layers": 3 }),
                yoco(5),
            ),
            (
                json!({ "num_layers": 56, "num_kv_reuse_layers": 21 }),
                yoco(35),
            ),
            (
                json!({ "gemma4.block_count": 35, "gemma4.attention.shared_kv_layers": 20 }),
                yoco(15),
            ),
            (json!({ "use_cla": false, "cla_share_factor": 2 }), None),
            (
                json!({ "use_cla": true, "cla_share_factor": 2 }),
                Some(KvPlan::Cla { factor: 2 }),
            ),
        ] {
            assert_eq!(plan(config.clone()).unwrap(), expected, "{config}");
        }
        let hymba = plan(json!({ "num_hidden_layers": 5, "kv_reuse_group": [[1, 2, 3]] }));
        let layout = hymba.unwrap().unwrap().resolve(5).unwrap();
        let stores = (0..5).map(|layer| layout.stores(crate::KvPart::Key, layer));
        assert_eq!(stores.collect::<Vec<_>>(), [true, true, false, false, true]);
        assert_eq!(layout.layer(3).value, KvSource::AsIs(1));
    }

    #[test]
    fn plans_that_cannot_be_are_errors() {
        for (config, named) in [
            (
                json!({ "num_hidden_layers": 4, "num_kv_shared_layers": 4 }),
                "num_kv_shared_layers",
            ),
            (json!({ "num_kv_shared_layers": 4 }), "num_hidden_layers"),
            (
                json!({ "num_hidden_layers": 4, "num_kv_shared_layers": -1 }),
                "num_kv_shared_layers",
            ),
            (
                json!({ "use_cla": true, "cla_share_factor": 0 }),
                "cla_share_factor",
            ),
            (
                json!({ "num_hidden_layers": 4, "kv_reuse_group": [[1, 4]] }),
                "kv_reuse_group",
            ),
            (
                json!({ "num_hidden_layers": 4, "kv_reuse_group": [[0, 1], [1, 2]] }),
                "kv_reuse_group",
            ),
            (
                json!({ "num_hidden_layers": 4, "kv_reuse_group": 3 }),
                "kv_reuse_group",
            ),
            // More layers than any model has.
            (
                json!({ "num_hidden_layers": 1_u64 << 60, "kv_reuse_group": [] }),
                "num_hidden_layers",
            ),
            (
                json!({ "num_layers": u64::MAX, "kv_reuse_group": [[0, 1]] }),
                "num_layers",
            ),
            (
                json!({ "a.block_count": MAX_LAYERS + 1, "kv_reuse_group": [[0, 1]] }),
                "a.block_count",
            ),
            (
                json!({
                    "num_hidden_layers": 4, "num_kv_shared_layers": 1, "num_kv_reuse_layers": 2
                }),
                "num_kv_reuse_layers",
            ),
        ] {
            let error = plan(config.clone()).unwrap_err();
            let is = matches!(&error, CheckpointError::Setting { key, .. } if key == named);
            assert!(is, "{config}: {error}");
        }
        assert!(matches!(plan(json!([])), Err(CheckpointError::Json { .. })));
    }
}
