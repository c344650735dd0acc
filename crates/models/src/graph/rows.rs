//! The rows of a step: whose they are, where they are, and which of them give logits.

use mlx_rs::Array;

use super::cache::KvCache;
use crate::kv::KvPlan;

/// What a step feeds to one sequence.
pub(crate) struct GraphRows<'a> {
    /// A cache for each layer.
    pub(crate) layers: &'a mut [KvCache],
    /// Tokens that the sequence has seen.
    pub(crate) position: usize,
    /// Tokens that it is fed.
    pub(crate) rows: usize,
    /// Logits that are wanted, of the last rows.
    pub(crate) wanted: usize,
}

/// Where the rows of a step belong.
pub(super) struct Batch<'a, 'b> {
    pub(super) parts: &'a mut [GraphRows<'b>],
    /// What is kept of each layer.
    pub(super) plan: &'a KvPlan,
    /// The position of the first row of each sequence, `[sequences]`, where several are fed equally many.
    pub(super) positions: Option<Array>,
}

impl<'a, 'b> Batch<'a, 'b> {
    pub(super) fn new(parts: &'a mut [GraphRows<'b>], plan: &'a KvPlan) -> Self {
        let mut rows = parts.iter().map(|part| part.rows);
        let first = rows.next();
        let equal = parts.len() > 1 && rows.all(|rows| Some(rows) == first);
        let positions = equal.then(|| {
            let positions: Vec<i32> = parts.iter().map(|part| part.position as i32).collect();
            Array::from_slice(&positions, &[positions.len() as i32])
        });
        Self {
            parts,
            plan,
            positions,
        }
    }
}

/// The rows of a step whose logits are wanted.
pub(super) enum Wanted {
    None,
    All,
    /// This one and all behind it.
    From(i32),
    Some(Vec<i32>),
}

impl Wanted {
    pub(super) fn of(parts: &[GraphRows<'_>]) -> Self {
        let (mut first, mut rows) = (0, Vec::new());
        for part in parts {
            let end = first + part.rows;
            rows.extend((end - part.wanted..end).map(|row| row as i32));
            first = end;
        }
        match (rows.first(), rows.last()) {
            (Some(0), _) if rows.len() == first => Self::All,
            (Some(&from), Some(&last))
                if (last - from + 1) as usize == rows.len() && last as usize + 1 == first =>
            {
                Self::From(from)
            }
            (Some(_), _) => Self::Some(rows),
            (None, _) => Self::None,
        }
    }
}
