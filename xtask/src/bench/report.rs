//! Figures of ours and of the peers, as a table and as JSON.

use serde_json::{Value, json};

/// Something that was measured of both, round by round.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) ours: Vec<f64>,
    /// Of nothing where no peer has it.
    pub(crate) peer: Vec<f64>,
    /// What the machine would allow.
    pub(crate) limit: Option<f64>,
}

impl Figure {
    fn ratio(&self) -> Option<f64> {
        Some(median(&self.ours)? / median(&self.peer)?)
    }

    /// Ours as a part of what the machine allows.
    fn share(&self) -> Option<f64> {
        Some(median(&self.ours)? / self.limit?)
    }

    fn json(&self) -> Value {
        json!({"name": self.name, "unit": self.unit, "ours": median(&self.ours), "ours_rounds": self.ours,
               "peer": median(&self.peer), "peer_rounds": self.peer, "ratio": self.ratio(), "limit": self.limit})
    }
}

/// The middle value, or the mean of the two; `None` of none.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        len if len % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// A line for each figure: ours, the peer's, the ratio, the limit and how much of it ours is.
pub(crate) fn table(peer: &str, figures: &[Figure]) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), digits);
    let percent =
        |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0));
    let head = ["figure", "unit", "ours", peer, "ratio", "limit", "of it"].map(str::to_owned);
    let mut rows = vec![head];
    rows.extend(figures.iter().map(|figure| {
        [
            figure.name.to_owned(),
            figure.unit.to_owned(),
            number(median(&figure.ours)),
            number(median(&figure.peer)),
            figure
                .ratio()
                .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            number(figure.limit),
            percent(figure.share()),
        ]
    }));
    let widths: Vec<usize> = (0..7)
        .map(|column| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let line = |row: &[String; 7]| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| match column {
            0 | 1 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

/// Three digits, as many as the figures deserve.
fn digits(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// All of it for programs.
pub(crate) fn report(machine: &Value, figures: &[Figure]) -> Value {
    json!({"machine": machine, "figures": figures.iter().map(Figure::json).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_those_of_the_sorted_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_table_has_ratios_and_shares() {
        let figure = Figure {
            name: "decode",
            unit: "tok/s",
            ours: vec![300.0, 310.0, 290.0],
            peer: vec![150.0],
            limit: Some(600.0),
        };
        let alone = Figure {
            name: "start",
            unit: "s",
            ours: vec![0.256],
            peer: Vec::new(),
            limit: None,
        };
        let text = table("llama.cpp", &[figure, alone]);
        assert_eq!(
            text,
            "figure  unit   ours  llama.cpp  ratio  limit  of it\n\
             decode  tok/s   300        150   2.00    600    50%\n\
             start   s      0.26          -      -      -      -\n"
        );
    }
}
