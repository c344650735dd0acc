//! The user's own models, layered over those that are there.

use std::path::Path;

use mlx_engine_core::{GenerateParams, ModelConfiguration, ModelType, Quantization};
use serde::Deserialize;

use crate::registry::fold;
use crate::{CacheShape, Capability, ModelEntry, ModelRegistry, RegistryError, Sampling};

/// The most that is read of a file: far above a list by hand.
const LARGEST_FILE: u64 = 4 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Layer {
    #[serde(default)]
    model: Vec<Patch>,
}

/// What the user says of a model; the rest is as it was, or unknown.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    id: String,
    name: Option<String>,
    description: Option<String>,
    family: Option<String>,
    parameters: Option<u64>,
    active_parameters: Option<u64>,
    quantization: Option<Quantization>,
    context_length: Option<u32>,
    size_bytes: Option<u64>,
    model_type: Option<ModelType>,
    default_system_prompt: Option<String>,
    aliases: Option<Vec<String>>,
    licence: Option<String>,
    released: Option<String>,
    capabilities: Option<Vec<Capability>>,
    languages: Option<Vec<String>>,
    sampling: Option<Sampling>,
    cache: Option<CacheShape>,
}

/// Puts what was given in the place of what was there.
fn set<T>(field: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *field = given;
    }
}

impl Patch {
    fn apply(self, entry: &mut ModelEntry) {
        let model = &mut entry.model;
        set(&mut model.name, self.name);
        set(&mut model.description, self.description);
        set(&mut model.family, self.family);
        set(&mut model.parameters, self.parameters);
        set(&mut model.context_length, self.context_length);
        set(&mut model.size_bytes, self.size_bytes);
        set(&mut model.model_type, self.model_type);
        set(&mut model.aliases, self.aliases);
        set(&mut model.active_parameters, self.active_parameters.map(Some));
        set(&mut model.quantization, self.quantization.map(Some));
        set(
            &mut model.default_system_prompt,
            self.default_system_prompt.map(Some),
        );
        set(&mut entry.licence, self.licence);
        set(&mut entry.released, self.released);
        set(&mut entry.capabilities, self.capabilities);
        set(&mut entry.languages, self.languages);
        set(&mut entry.sampling, self.sampling.map(Some));
        set(&mut entry.cache, self.cache.map(Some));
    }
}

/// What types cannot say.
fn validate(entry: &ModelEntry) -> Result<(), RegistryError> {
    let invalid = |field: &str, value: String, allowed: String| RegistryError::Invalid {
        field: field.to_owned(),
        value,
        allowed,
        model: entry.id.clone(),
    };
    if let Some(active) = entry.model.active_parameters
        && (active == 0 || active > entry.parameters)
    {
        let allowed = format!("1 to `parameters`, {}", entry.parameters);
        return Err(invalid("active_parameters", active.to_string(), allowed));
    }
    if let Some(sampling) = entry.sampling
        && let Err(error) = sampling.apply(GenerateParams::default()).validate()
    {
        return Err(invalid(
            &format!("sampling.{}", error.field()),
            error.value().to_owned(),
            error.allowed().to_owned(),
        ));
    }
    let is_month = |text: &str| {
        let digits =
            |part: &str, length| part.len() == length && part.bytes().all(|byte| byte.is_ascii_digit());
        text.split_once('-').is_some_and(|(year, month)| {
            digits(year, 4) && digits(month, 2) && ("01"..="12").contains(&month)
        })
    };
    if !entry.released.is_empty() && !is_month(&entry.released) {
        return Err(invalid(
            "released",
            entry.released.clone(),
            "a year and a month, as 2025-04".to_owned(),
        ));
    }
    Ok(())
}

impl ModelRegistry {
    /// Layers models over those that are there: TOML with the keys of the built-in list.
    ///
    /// An entry with the id of a model that is there changes the fields that it gives. Any other entry is a new
    /// model, which needs `model_type` beside its `id`. An alias that another model had before goes to the entry.
    ///
    /// ```
    /// use mlx_engine_registry::ModelRegistry;
    ///
    /// let mut registry = ModelRegistry::builtin().clone();
    /// registry.layer(
    ///     r#"
    ///     [[model]]
    ///     id = "mlx-community/Qwen3-4B-4bit"
    ///     default_system_prompt = "Answer in one sentence."
    ///
    ///     [[model]]
    ///     id = "models/house-7b"
    ///     model_type = "chat"
    ///     aliases = ["qwen3"]
    ///     "#,
    /// )?;
    /// assert_eq!(registry.get("qwen3")?.id, "models/house-7b");
    /// assert_eq!(registry.get("qwen3-4b")?.default_system_prompt.as_deref(), Some("Answer in one sentence."));
    /// # Ok::<(), mlx_engine_registry::RegistryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Malformed`](RegistryError::Malformed), [`Invalid`](RegistryError::Invalid), and what
    /// [`register`](Self::register) refuses. The registry is then as it was.
    pub fn layer(&mut self, text: &str) -> Result<(), RegistryError> {
        let layer: Layer = toml::from_str(text).map_err(|error| RegistryError::Malformed {
            reason: error.to_string(),
        })?;
        let mut entries: Vec<ModelEntry> = self.entries().cloned().collect();
        let mut given: Vec<usize> = Vec::with_capacity(layer.model.len());
        // Those whose aliases the user wrote.
        let mut claims: Vec<usize> = Vec::new();
        for patch in layer.model {
            let key = fold(&patch.id);
            let known = entries.iter().position(|entry| fold(&entry.id) == key);
            let index = match (known, patch.model_type) {
                (Some(index), _) => index,
                (None, Some(model_type)) => {
                    entries.push(ModelConfiguration::new(patch.id.clone(), model_type).into());
                    entries.len() - 1
                }
                (None, None) => {
                    return Err(RegistryError::Invalid {
                        field: "model_type".to_owned(),
                        value: "missing".to_owned(),
                        allowed: "what a new model is for".to_owned(),
                        model: patch.id,
                    });
                }
            };
            if given.contains(&index) {
                let owner = entries[index].id.clone();
                return Err(RegistryError::Duplicate {
                    field: "id".to_owned(),
                    value: patch.id.clone(),
                    model: patch.id,
                    owner,
                });
            }
            if patch.aliases.is_some() {
                claims.push(index);
            }
            let entry = &mut entries[index];
            patch.apply(entry);
            validate(entry)?;
            given.push(index);
        }
        let taken: Vec<String> = claims
            .iter()
            .flat_map(|&index| &entries[index].aliases)
            .map(|alias| fold(alias))
            .collect();
        for (index, entry) in entries.iter_mut().enumerate() {
            if !claims.contains(&index) {
                entry.model.aliases.retain(|alias| !taken.contains(&fold(alias)));
            }
        }
        let mut layered = Self::new();
        for entry in entries {
            layered.register_entry(entry)?;
        }
        *self = layered;
        Ok(())
    }

    /// As [`layer`](Self::layer), from a file of at most 4 MiB.
    ///
    /// # Errors
    ///
    /// [`Unreadable`](RegistryError::Unreadable), or as [`layer`](Self::layer).
    pub fn layer_file(&mut self, path: &Path) -> Result<(), RegistryError> {
        let unreadable = |reason: String| RegistryError::Unreadable {
            path: path.display().to_string(),
            reason,
        };
        let size = std::fs::metadata(path)
            .map_err(|error| unreadable(error.to_string()))?
            .len();
        if size > LARGEST_FILE {
            return Err(unreadable(format!(
                "it has {size} bytes, at most {LARGEST_FILE} are read"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        self.layer(&text)
    }
}
