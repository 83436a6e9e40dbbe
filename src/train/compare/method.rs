//! What is compared: a name and the decoder it stands for.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{ConfigError, FusedKvDecoderConfig, FusionStart};
use crate::plan::{KvPlan, PlanError};

/// The methods of the paper's comparison, and FusedKV in each initialisation.
pub const DEFAULT_METHODS: &[&str] = &[
    "standard",
    "gqa",
    "cla",
    "yoco",
    "yoco-plus-plus",
    "fused-kv-lite",
    "fused-kv-lite-reversed",
    "fused-kv-lite-learnable",
    "fused-kv:init=lite",
    "fused-kv:init=equal",
];

/// A named decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Method {
    /// As it was asked for; tables and files are labelled with it.
    pub name: String,
    /// The decoder.
    pub model: FusedKvDecoderConfig,
}

/// A method that cannot be read, or that no decoder can be built for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MethodError {
    /// An option with a name no method has, or this one has not.
    #[error("`{method}` has no option `{option}`, expected {expected}")]
    UnknownOption {
        /// The method as written.
        method: String,
        /// The option found.
        option: String,
        /// The options it has.
        expected: &'static str,
    },
    /// An option whose value is not what it takes.
    #[error("`{option}` of `{method}` is `{value}`, expected {expected}")]
    OptionValue {
        /// The method as written.
        method: String,
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// Two methods of one name would write to one directory.
    #[error("two methods are named `{0}`, expected each once")]
    Duplicate(String),
    /// A file of plans that is not one.
    #[error("the plans cannot be read: {0}")]
    Plans(String),
    /// No such method, or a plan that makes no sense at this depth.
    #[error("`{method}`: {source}")]
    Plan {
        /// The method as written.
        method: String,
        /// What is wrong.
        source: PlanError,
    },
    /// A decoder that cannot be built.
    #[error("`{method}`: {source}")]
    Config {
        /// The method as written.
        method: String,
        /// What is wrong.
        source: ConfigError,
    },
}

/// An entry of a file of plans.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct NamedPlan {
    name: String,
    plan: KvPlan,
    #[serde(default)]
    n_kv_heads: Option<usize>,
    /// Where the α of residuals start.
    #[serde(default)]
    alpha: Option<f64>,
}

impl Method {
    /// Reads `name` or `name:option=value,…`, everything else as in `base`.
    ///
    /// Names are those of [`KvPlan::methods`], with `-` or `_`, and `gqa`: the standard cache at
    /// half of `base`'s kv heads. Options: `n`, the layers that store; `factor`, for `cla`;
    /// `kv-heads`; `ffn`, the inner width of the SwiGLU blocks, for methods of equal parameters;
    /// `init`, `lite` or `equal`, where learned fusion weights start; `noise`, the standard deviation
    /// around it; `alpha`, for `yoco-plus-plus`, where its α start.
    ///
    /// ```
    /// use fusedkv::train::compare::Method;
    /// use fusedkv::{FusedKvDecoderConfig, KvPlan};
    ///
    /// let base = FusedKvDecoderConfig::tiny(512, KvPlan::Standard);
    /// let method = Method::parse("fused-kv:n=2,kv-heads=2", &base)?;
    /// assert_eq!(method.model.plan, KvPlan::FusedKv { storage_layers: 2 });
    /// assert_eq!(method.model.n_kv_heads, 2);
    /// # Ok::<(), fusedkv::train::compare::MethodError>(())
    /// ```
    ///
    /// # Errors
    /// [`MethodError`] naming the first part that cannot be read or built.
    pub fn parse(text: &str, base: &FusedKvDecoderConfig) -> Result<Self, MethodError> {
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        let mut model = base.clone();
        let canonical = match name {
            "gqa" => {
                model.n_kv_heads = (base.n_kv_heads / 2).max(1);
                "standard".to_owned()
            }
            name => name.replace('-', "_"),
        };
        model.plan =
            KvPlan::from_method(&canonical, base.n_layers).map_err(|source| MethodError::Plan {
                method: text.to_owned(),
                source,
            })?;
        for option in options.split(',').filter(|option| !option.is_empty()) {
            set_option(text, option, &mut model)?;
        }
        Self::new(text, model)
    }

    /// Reads plans from JSON: a list of `{"name": …, "plan": …, "n_kv_heads": …, "alpha": …}`, where
    /// `plan` is a [`KvPlan`] and the last two may be left out; `alpha` is where the α of its
    /// residuals start.
    ///
    /// # Errors
    /// [`MethodError`] if it is no such list, or no decoder can be built by a plan.
    pub fn from_plans(json: &str, base: &FusedKvDecoderConfig) -> Result<Vec<Self>, MethodError> {
        let plans: Vec<NamedPlan> =
            serde_json::from_str(json).map_err(|error| MethodError::Plans(error.to_string()))?;
        plans
            .into_iter()
            .map(|named| {
                let mut model = FusedKvDecoderConfig {
                    plan: named.plan,
                    n_kv_heads: named.n_kv_heads.unwrap_or(base.n_kv_heads),
                    ..base.clone()
                };
                if let Some(alpha) = named.alpha {
                    model.fusion_init.residual = alpha;
                }
                Self::new(&named.name, model)
            })
            .collect()
    }

    /// Checks that every name is there once.
    ///
    /// # Errors
    /// [`MethodError::Duplicate`] otherwise.
    pub fn check_names(methods: &[Self]) -> Result<(), MethodError> {
        let mut seen = std::collections::BTreeSet::new();
        match methods.iter().find(|method| !seen.insert(method.slug())) {
            Some(method) => Err(MethodError::Duplicate(method.name.clone())),
            None => Ok(()),
        }
    }

    /// The name as part of a file's.
    pub fn slug(&self) -> String {
        self.name
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                    c
                } else {
                    '-'
                }
            })
            .collect()
    }

    fn new(name: &str, model: FusedKvDecoderConfig) -> Result<Self, MethodError> {
        model.validate().map_err(|source| MethodError::Config {
            method: name.to_owned(),
            source,
        })?;
        Ok(Self {
            name: name.to_owned(),
            model,
        })
    }
}

fn set_option(
    method: &str,
    option: &str,
    model: &mut FusedKvDecoderConfig,
) -> Result<(), MethodError> {
    let (key, value) = option.split_once('=').unwrap_or((option, ""));
    let wrong = |expected| MethodError::OptionValue {
        method: method.to_owned(),
        option: key.to_owned(),
        value: value.to_owned(),
        expected,
    };
    let count = || value.parse::<usize>().map_err(|_| wrong("a whole number"));
    if key == "n"
        && let Some(layers) = model.plan.storage_layers_mut()
    {
        *layers = count()?;
        return Ok(());
    }
    match (key, &mut model.plan) {
        ("kv-heads", _) => model.n_kv_heads = count()?,
        ("ffn", _) => model.ffn_size = count()?,
        ("factor", KvPlan::Cla { factor }) => *factor = count()?,
        ("init", _) => {
            model.fusion_init.start = match value {
                "lite" => FusionStart::Lite,
                "equal" => FusionStart::Equal,
                _ => return Err(wrong("lite or equal")),
            };
        }
        ("noise", _) => {
            model.fusion_init.noise = value.parse().map_err(|_| wrong("a number"))?;
        }
        ("alpha", KvPlan::YocoPlusPlus { .. }) => {
            model.fusion_init.residual = value.parse().map_err(|_| wrong("a number"))?;
        }
        (_, plan) => {
            return Err(MethodError::UnknownOption {
                method: method.to_owned(),
                option: key.to_owned(),
                expected: match plan {
                    KvPlan::Standard => "kv-heads, ffn, init or noise",
                    KvPlan::Cla { .. } => "factor, kv-heads, ffn, init or noise",
                    KvPlan::YocoPlusPlus { .. } => "n, kv-heads, ffn, init, noise or alpha",
                    _ => "n, kv-heads, ffn, init or noise",
                },
            });
        }
    }
    Ok(())
}
