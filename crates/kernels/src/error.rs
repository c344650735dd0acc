//! What a kernel refuses.

/// Why a kernel did not run. The shapes are checked before anything is read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A slice has another length than the shapes make.
    #[error("{what} has {found} elements where the shapes make {expected}")]
    Length {
        /// The argument.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length that the other arguments make.
        expected: usize,
    },
    /// Bits or a group size that no format has.
    #[error("a matrix of {bits} bits in groups of {group_size} with {columns} columns has no layout here")]
    Layout {
        /// Bits of a weight.
        bits: u32,
        /// Weights that share a scale.
        group_size: usize,
        /// Columns of the matrix.
        columns: usize,
    },
    /// An index beyond the end.
    #[error("{what} {index} is beyond the last, of {len}")]
    Index {
        /// What is counted.
        what: &'static str,
        /// The index.
        index: usize,
        /// How many there are.
        len: usize,
    },
    /// Activations were made ready for another instruction set.
    #[error("the activations were prepared for another instruction set")]
    OtherIsa,
    /// The environment names an instruction set that this processor does not have.
    #[error("{} names the instruction set `{name}`, this processor has: {}", crate::ISA_VARIABLE, available.join(", "))]
    UnknownIsa {
        /// The name.
        name: String,
        /// The names that would do.
        available: Vec<&'static str>,
    },
    /// Memory that is not there, or beyond a limit.
    #[error("out of memory: {bytes} bytes could not be allocated")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// A task of the thread pool panicked.
    #[error("a kernel panicked: {0}")]
    Panicked(String),
}

/// Compares a length with what it should be.
pub(crate) fn check_len(what: &'static str, found: usize, expected: usize) -> Result<(), KernelError> {
    if found == expected {
        Ok(())
    } else {
        Err(KernelError::Length {
            what,
            found,
            expected,
        })
    }
}
