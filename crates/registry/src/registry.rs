//! The registry: models in order, and what each may be called.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use mlx_engine_core::ModelConfiguration;
use serde::Deserialize;

use crate::{ModelEntry, RegistryError, suggest};

/// The owner on the hub that a reference may leave out.
const DEFAULT_OWNER: &str = "mlx-community/";

static BUILTIN: LazyLock<ModelRegistry> = LazyLock::new(|| {
    parse(include_str!("../models.toml")).unwrap_or_else(|message| panic!("models.toml: {message}"))
});

/// Models, in the order in which they were registered, and what each may be called.
///
/// References are compared without regard to case, to space around them and to the owner `mlx-community/`.
///
/// **Invariant:** no two models share an id or an alias. Names may repeat; [`get`](Self::get) then asks for an id.
///
/// ```
/// use mlx_engine_core::{ModelConfiguration, ModelType};
/// use mlx_engine_registry::ModelRegistry;
///
/// let mut registry = ModelRegistry::builtin().clone();
/// registry.register(ModelConfiguration {
///     aliases: vec!["house".to_owned()],
///     ..ModelConfiguration::new("models/house-7b", ModelType::Chat)
/// })?;
/// assert_eq!(registry.get("HOUSE")?.id, "models/house-7b");
/// # Ok::<(), mlx_engine_registry::RegistryError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ModelRegistry {
    models: Vec<ModelEntry>,
    /// From each folded id and alias to the index of its model.
    keys: BTreeMap<String, usize>,
}

impl ModelRegistry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// The curated models, all of them under `mlx-community` on the hub. Clone it to add to it.
    ///
    /// Parameters count every weight once. Sizes are approximate: most follow from the parameters and the
    /// quantization, the others are those that the hub shows. None includes the tokenizer.
    pub fn builtin() -> &'static Self {
        &BUILTIN
    }

    /// Every model, in the order of registration.
    pub fn models(&self) -> impl ExactSizeIterator<Item = &ModelConfiguration> {
        self.models.iter().map(|entry| &entry.model)
    }

    /// Every model with what helps to choose it, in the order of registration.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &ModelEntry> {
        self.models.iter()
    }

    /// How many models there are.
    pub fn len(&self) -> usize {
        self.models.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    /// The model that goes by an id, an alias or a name. The id decides where it is another model's name too.
    ///
    /// ```
    /// use mlx_engine_registry::ModelRegistry;
    ///
    /// let registry = ModelRegistry::builtin();
    /// for reference in ["mlx-community/Qwen3-0.6B-4bit", "qwen3-0.6b-4bit", "qwen3-0.6b", "Qwen3 0.6B"] {
    ///     assert_eq!(registry.get(reference)?.parameters, 596_049_920);
    /// }
    /// # Ok::<(), mlx_engine_registry::RegistryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](RegistryError::NotFound) with what was perhaps meant, or
    /// [`Ambiguous`](RegistryError::Ambiguous) where a name, or a name and an alias, fit several models.
    pub fn get(&self, reference: &str) -> Result<&ModelConfiguration, RegistryError> {
        self.entry(reference).map(|entry| &entry.model)
    }

    /// As [`get`](Self::get), with what helps to choose the model.
    pub fn entry(&self, reference: &str) -> Result<&ModelEntry, RegistryError> {
        let key = fold(reference);
        let by_key = self.keys.get(&key).map(|&index| &self.models[index]);
        if let Some(model) = by_key.filter(|model| fold(&model.id) == key) {
            return Ok(model);
        }
        let is_meant = |model: &&ModelEntry| {
            by_key.is_some_and(|aliased| aliased.id == model.id) || fold(&model.name) == key
        };
        let mut candidates: Vec<&ModelEntry> = if key.is_empty() {
            Vec::new()
        } else {
            self.models.iter().filter(is_meant).collect()
        };
        match (candidates.pop(), candidates.is_empty()) {
            (Some(model), true) => Ok(model),
            (Some(last), false) => Err(RegistryError::Ambiguous {
                reference: reference.to_owned(),
                candidates: candidates
                    .into_iter()
                    .chain([last])
                    .map(|model| model.id.clone())
                    .collect(),
            }),
            (None, _) => Err(RegistryError::NotFound {
                reference: reference.to_owned(),
                suggestions: self.suggest(&key),
            }),
        }
    }

    /// Adds a model.
    ///
    /// # Errors
    ///
    /// [`Duplicate`](RegistryError::Duplicate) where the id or an alias is another model's id or alias,
    /// [`Blank`](RegistryError::Blank) where one is blank. The registry is then as it was.
    pub fn register(&mut self, model: ModelConfiguration) -> Result<(), RegistryError> {
        self.register_entry(model.into())
    }

    /// As [`register`](Self::register), with what helps to choose the model.
    pub fn register_entry(&mut self, model: ModelEntry) -> Result<(), RegistryError> {
        let aliases = model.aliases.iter().enumerate();
        let fields = [("id".to_owned(), &model.id)]
            .into_iter()
            .chain(aliases.map(|(index, alias)| (format!("aliases[{index}]"), alias)));
        let mut keys = Vec::with_capacity(1 + model.aliases.len());
        for (field, value) in fields {
            let key = fold(value);
            if key.is_empty() {
                return Err(RegistryError::Blank {
                    field,
                    model: model.id.clone(),
                });
            }
            if let Some(&owner) = self.keys.get(&key) {
                return Err(RegistryError::Duplicate {
                    field,
                    value: value.clone(),
                    model: model.id.clone(),
                    owner: self.models[owner].id.clone(),
                });
            }
            keys.push(key);
        }
        let index = self.models.len();
        self.keys.extend(keys.into_iter().map(|key| (key, index)));
        self.models.push(model);
        Ok(())
    }

    fn suggest(&self, key: &str) -> Vec<String> {
        let candidates = self.models.iter().map(|model| {
            let keys = [&model.id, &model.name].into_iter().chain(&model.aliases);
            (&*model.id, keys.map(|key| fold(key)).collect())
        });
        suggest::nearest(key, candidates)
    }
}

/// What of a reference is compared.
pub(crate) fn fold(reference: &str) -> String {
    let folded = reference.trim().to_lowercase();
    folded
        .strip_prefix(DEFAULT_OWNER)
        .map(str::to_owned)
        .unwrap_or(folded)
}

#[derive(Deserialize)]
struct ModelFile {
    model: Vec<ModelEntry>,
}

fn parse(text: &str) -> Result<ModelRegistry, String> {
    let file: ModelFile = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut registry = ModelRegistry::new();
    for model in file.model {
        registry
            .register_entry(model)
            .map_err(|error| error.to_string())?;
    }
    Ok(registry)
}

#[cfg(test)]
mod tests {
    use mlx_engine_core::ModelType;
    use proptest::prelude::*;

    use super::*;
    use crate::SearchCriteria;

    fn model(id: &str, name: &str, aliases: &[&str]) -> ModelConfiguration {
        ModelConfiguration {
            name: name.to_owned(),
            aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
            ..ModelConfiguration::new(id, ModelType::Chat)
        }
    }

    fn registry(models: impl IntoIterator<Item = ModelConfiguration>) -> ModelRegistry {
        let mut registry = ModelRegistry::new();
        for model in models {
            registry.register(model).unwrap();
        }
        registry
    }

    fn check_get(registry: &ModelRegistry, reference: &str, expect: &str) {
        let found = registry
            .get(reference)
            .map_or_else(|error| error.to_string(), |model| model.id.clone());
        assert_eq!(found, expect, "{reference:?}");
    }

    #[test]
    fn a_reference_is_an_id_an_alias_or_a_name() {
        for (reference, expect) in [
            (
                "mlx-community/SmolLM2-135M-Instruct",
                "mlx-community/SmolLM2-135M-Instruct",
            ),
            (
                "MLX-Community/smollm2-135m-instruct",
                "mlx-community/SmolLM2-135M-Instruct",
            ),
            ("smollm2-135m-INSTRUCT", "mlx-community/SmolLM2-135M-Instruct"),
            ("smollm2-135m", "mlx-community/SmolLM2-135M-Instruct"),
            (
                "mlx-community/smollm2-135m",
                "mlx-community/SmolLM2-135M-Instruct",
            ),
            ("  smollm2-135m\n", "mlx-community/SmolLM2-135M-Instruct"),
            ("smollm2 135m instruct", "mlx-community/SmolLM2-135M-Instruct"),
            ("smollm2-135m-8bit", "mlx-community/SmolLM2-135M-Instruct-8bit"),
            ("phi4", "mlx-community/phi-4-4bit"),
            ("PHI 4", "mlx-community/phi-4-4bit"),
            ("qwen3", "mlx-community/Qwen3-8B-4bit"),
            ("Qwen/Qwen3-8B", "model `Qwen/Qwen3-8B` not found"),
            ("", "model `` not found"),
            ("mlx-community/", "model `mlx-community/` not found"),
        ] {
            check_get(ModelRegistry::builtin(), reference, expect);
        }
    }

    #[test]
    fn a_name_of_several_models_asks_for_an_id_and_the_id_decides() {
        let registry = registry([
            model("a/tiny", "Tiny", &[]),
            model("b/tiny", "tiny", &["small"]),
            model("c/mini", "Small", &[]),
            model("Tiny", "Local", &[]),
            model("d/micro", "Micro", &["micro"]),
            model("e/other", "Other", &["Local"]),
        ]);
        for (reference, expect) in [
            ("tiny", "Tiny"),
            ("b/tiny", "b/tiny"),
            (
                "SMALL",
                "model `SMALL` is ambiguous between `b/tiny` and `c/mini`",
            ),
            ("local", "model `local` is ambiguous between `Tiny` and `e/other`"),
            ("micro", "d/micro"),
        ] {
            check_get(&registry, reference, expect);
        }
    }

    #[test]
    fn suggestions_are_near_and_in_order() {
        for (reference, expect) in [
            (
                "qwen3-4",
                &[
                    "mlx-community/Qwen3-4B-4bit",
                    "mlx-community/Qwen3-14B-4bit",
                    "mlx-community/Qwen3-8B-4bit",
                ][..],
            ),
            (
                "lama3.3",
                &[
                    "mlx-community/Llama-3.3-70B-Instruct-4bit",
                    "mlx-community/Llama-3.2-3B-Instruct-4bit",
                    "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
                ],
            ),
            ("reranker", &["mlx-community/Qwen3-Reranker-0.6B-4bit"]),
            ("stable-diffusion", &[]),
        ] {
            let error = ModelRegistry::builtin().get(reference).unwrap_err();
            let RegistryError::NotFound { suggestions, .. } = error else {
                panic!("{reference}: {error:?}");
            };
            assert_eq!(suggestions, expect, "{reference}");
        }
    }

    #[test]
    fn a_search_sorts_by_the_number_and_not_by_its_digits() {
        let sized = |id: &str, parameters| ModelConfiguration {
            parameters,
            ..model(id, id, &[])
        };
        let registry = registry([
            sized("b-13b", 13_000_000_000),
            sized("c-7b", 7_000_000_000),
            sized("a-70b", 70_000_000_000),
            sized("a-7b", 7_000_000_000),
        ]);
        let ids = |min_parameters| -> Vec<&str> {
            let criteria = SearchCriteria {
                min_parameters,
                ..SearchCriteria::default()
            };
            let found = registry.search_models(&criteria);
            found.iter().map(|model| &*model.id).collect()
        };
        assert_eq!(ids(None), ["a-7b", "c-7b", "b-13b", "a-70b"]);
        assert_eq!(ids(Some(8_000_000_000)), ["b-13b", "a-70b"]);
        let order: Vec<&str> = registry.models().map(|model| &*model.id).collect();
        assert_eq!(order, ["b-13b", "c-7b", "a-70b", "a-7b"]);
    }

    #[test]
    fn a_registration_that_is_refused_names_both_and_changes_nothing() {
        let mut registry = registry([model("owner/one", "One", &["uno"])]);
        for (model, expect) in [
            (
                model("OWNER/One", "Other", &[]),
                "`id` of model `OWNER/One` is `OWNER/One`, which already names model `owner/one`",
            ),
            (
                model("mlx-community/uno", "Other", &[]),
                "`id` of model `mlx-community/uno` is `mlx-community/uno`, which already names model `owner/one`",
            ),
            (
                model("owner/two", "Two", &["dos", "Uno"]),
                "`aliases[1]` of model `owner/two` is `Uno`, which already names model `owner/one`",
            ),
            (model(" ", "Blank", &[]), "`id` of model ` ` is blank"),
            (
                model("owner/two", "Two", &[""]),
                "`aliases[0]` of model `owner/two` is blank",
            ),
        ] {
            assert_eq!(registry.register(model).unwrap_err().to_string(), expect);
            assert_eq!(registry.len(), 1);
            check_get(&registry, "dos", "model `dos` not found");
        }
        registry.register(model("owner/two", "Two", &["dos"])).unwrap();
        check_get(&registry, "dos", "owner/two");
    }

    #[test]
    fn malformed_data_is_refused_with_a_reason() {
        for (text, expect) in [
            ("", "missing field `model`"),
            ("[[model]]\nid = 'a'", "missing field"),
            (
                "[[model]]\nid = 'a'\nname = 'a'\nparameters = -1\ncontext_length = 1\nsize_bytes = 1\nmodel_type = 'chat'",
                "invalid value",
            ),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(expect), "{message}");
        }
    }

    proptest! {
        #[test]
        fn no_reference_panics(reference in any::<String>(), near in "(mlx-community/)?[qlmp][a-z0-9. -]{0,20}") {
            for reference in [reference, near] {
                if let Err(RegistryError::NotFound { suggestions, .. }) = ModelRegistry::builtin().get(&reference) {
                    prop_assert!(suggestions.len() <= 3);
                    for id in suggestions {
                        prop_assert_eq!(&ModelRegistry::builtin().get(&id).unwrap().id, &id);
                    }
                }
            }
        }

        #[test]
        fn what_is_registered_is_found_and_cannot_be_registered_again(
            id in "[A-Za-z0-9/. -]{0,8}[A-Za-z0-9]",
            alias in "[A-Za-z0-9]{1,8}",
            upper in any::<bool>(),
        ) {
            let mut registry = registry([model(&id, "name", &[&alias])]);
            prop_assert_eq!(&registry.get(&id).unwrap().id, &id);
            prop_assert_eq!(&registry.get(&alias).unwrap().id, &id);
            let case = |text: &str| if upper { text.to_uppercase() } else { text.to_lowercase() };
            for again in [
                model(&case(&id), "again", &[]),
                model(&case(&alias), "again", &[]),
                model("another/model", "again", &[&case(&alias)]),
                model("another/model", "again", &["free", &case(&id)]),
            ] {
                let refused = matches!(
                    registry.register(again),
                    Err(RegistryError::Duplicate { owner, .. }) if owner == id
                );
                prop_assert!(refused);
            }
            prop_assert_eq!(registry.len(), 1);
        }
    }
}
