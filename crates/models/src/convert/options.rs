//! What a conversion is asked for, and what it did.

use std::fmt;

use mlx_engine_checkpoint::FloatType;

/// How many bits the matrices get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightBits {
    /// Those that they have: what is quantized stays so, bit for bit, where MLX has its form, and becomes floats where not.
    #[default]
    AsTheyAre,
    /// The same for all matrices. One that has them already keeps its integers, and one whose rows are no whole groups stays what it
    /// is.
    Uniform {
        /// 2, 3, 4, 5, 6 or 8.
        bits: u32,
        /// Numbers that share a scale: 32, 64 or 128.
        group_size: u32,
    },
    /// More for those that matter more.
    Mixed {
        /// Which matrices get how many.
        recipe: Recipe,
        /// Numbers that share a scale: 32, 64 or 128.
        group_size: u32,
    },
    /// Floats.
    Floats,
}

/// mlx-lm's recipes of mixed bits: values and the way back down of the MLP get the higher number in the first and last eighth of
/// the layers and in every third one between, and so does the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// 2 and 6 bits.
    Mixed2And6,
    /// 3 and 4 bits.
    Mixed3And4,
    /// 3 and 6 bits.
    Mixed3And6,
    /// 4 and 6 bits.
    Mixed4And6,
}

impl Recipe {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Mixed2And6,
        Self::Mixed3And4,
        Self::Mixed3And6,
        Self::Mixed4And6,
    ];

    /// The name that mlx-lm has for it, such as `mixed_4_6`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixed2And6 => "mixed_2_6",
            Self::Mixed3And4 => "mixed_3_4",
            Self::Mixed3And6 => "mixed_3_6",
            Self::Mixed4And6 => "mixed_4_6",
        }
    }

    /// The lower and the higher number of bits.
    pub fn bits(self) -> (u32, u32) {
        match self {
            Self::Mixed2And6 => (2, 6),
            Self::Mixed3And4 => (3, 4),
            Self::Mixed3And6 => (3, 6),
            Self::Mixed4And6 => (4, 6),
        }
    }

    /// The bits of a matrix, by its name and the number of layers, as `mixed_quant_predicate_builder` of mlx-lm has it.
    pub fn bits_of(self, name: &str, layers: usize) -> u32 {
        let (low, high) = self.bits();
        let layer = name.split('.').find_map(|part| part.parse::<usize>().ok());
        let layer = layer.unwrap_or(0);
        // In its integers -1 % 3 is 2, and no layer is below 0.
        let every_third = layer >= layers / 8 && (layer - layers / 8) % 3 == 2;
        let matters = layer < layers / 8 || layer >= 7 * layers / 8 || every_third;
        let wants_more = name.contains("v_proj") || name.contains("down_proj");
        if name.contains("lm_head") || (wants_more && matters) {
            high
        } else {
            low
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a conversion is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvertOptions {
    /// The bits of the matrices.
    pub bits: WeightBits,
    /// The type of what is floating point: norms, biases, scales, and matrices that are not quantized.
    ///
    /// Where `None`, it is the `torch_dtype` of `config.json`, as with mlx-lm, or the type that each tensor has. Of a GGUF file
    /// matrices keep their type, scales that were float16 stay so, and norms, which GGUF keeps in float32, become what the
    /// matrices are where that changes none of them.
    pub dtype: Option<FloatType>,
}

/// What became of tensors of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// What they were, such as `Q4_1` or `bfloat16`.
    pub from: String,
    /// What they are, such as `4 bits in groups of 32`.
    pub to: String,
    /// How many there are.
    pub tensors: usize,
    /// How many of them have the very values that they had.
    pub exact: usize,
    /// Their elements.
    pub elements: u64,
}

/// How far a conversion has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertProgress<'a> {
    /// Bytes of weights that are written.
    pub done: u64,
    /// Bytes of weights that will be.
    pub total: u64,
    /// The tensor that is being written.
    pub tensor: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written down from a run of mlx-lm's predicate over a model of ten layers.
    #[test]
    fn layers_of_a_recipe() {
        let more: Vec<usize> = (0..10)
            .filter(|layer| {
                Recipe::Mixed4And6.bits_of(&format!("model.layers.{layer}.self_attn.v_proj"), 10) == 6
            })
            .collect();
        assert_eq!(more, [0, 3, 6, 8, 9]);
    }
}
