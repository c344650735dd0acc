//! Figures of ours and of the peers, as a table and as JSON.

use serde_json::{Map, Value, json};

use super::curves::Curve;

/// The peers, in the order of what is measured of them.
pub(crate) const PEERS: [&str; 2] = ["llama.cpp", "mlx-lm"];

/// Something that was measured of all, round by round.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) ours: Vec<f64>,
    /// Of nothing where a peer does not have it.
    pub(crate) peers: [Vec<f64>; PEERS.len()],
    /// What the machine would allow.
    pub(crate) limit: Option<f64>,
}

impl Figure {
    pub(crate) fn new(name: &'static str, unit: &'static str, limit: Option<f64>) -> Self {
        Self {
            name,
            unit,
            ours: Vec::new(),
            peers: Default::default(),
            limit,
        }
    }

    /// Whether less of it is better: times and memory, where the others are speeds.
    pub(crate) fn less_is_better(&self) -> bool {
        ["s", "ms", "MB"].contains(&self.unit)
    }

    /// Ours over a peer's.
    pub(crate) fn ratio(&self, peer: usize) -> Option<f64> {
        Some(median(&self.ours)? / median(&self.peers[peer])?)
    }

    /// Ours as a part of what the machine allows.
    fn share(&self) -> Option<f64> {
        Some(median(&self.ours)? / self.limit?)
    }

    fn json(&self) -> Value {
        let peers: Map<String, Value> = PEERS
            .iter()
            .zip(&self.peers)
            .enumerate()
            .filter(|(_, (_, rounds))| !rounds.is_empty())
            .map(|(at, (name, rounds))| {
                let told = json!({"median": median(rounds), "rounds": rounds, "ratio": self.ratio(at)});
                ((*name).to_owned(), told)
            })
            .collect();
        json!({"name": self.name, "unit": self.unit, "ours": median(&self.ours), "ours_rounds": self.ours, "peers": peers,
               "limit": self.limit})
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

/// A line for each figure: ours, each peer's with the ratio, the limit and how much of it ours is.
pub(crate) fn table(figures: &[Figure]) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), digits);
    let mut head = vec!["figure", "unit", "ours"];
    for peer in PEERS {
        head.extend([peer, "ratio"]);
    }
    head.extend(["limit", "of it"]);
    let mut rows: Vec<Vec<String>> = vec![head.into_iter().map(str::to_owned).collect()];
    for figure in figures {
        let mut row = vec![
            figure.name.to_owned(),
            figure.unit.to_owned(),
            number(median(&figure.ours)),
        ];
        for (at, rounds) in figure.peers.iter().enumerate() {
            row.push(number(median(rounds)));
            row.push(ratio(figure.ratio(at)));
        }
        row.push(number(figure.limit));
        let share = figure.share();
        row.push(share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0)));
        rows.push(row);
    }
    columns(&rows)
}

/// Rows of cells, the first two of each flush left, the others right.
pub(crate) fn columns(rows: &[Vec<String>]) -> String {
    let wide = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = wide(column);
            match column {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

/// Three digits, as many as the figures deserve.
pub(crate) fn digits(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

pub(crate) fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
}

/// All of it for programs.
pub(crate) fn report(machine: &Value, figures: &[Figure], curves: &[Curve]) -> Value {
    json!({"machine": machine, "figures": figures.iter().map(Figure::json).collect::<Vec<_>>(),
           "curves": curves.iter().map(Curve::json).collect::<Vec<_>>()})
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
        let decode = Figure {
            ours: vec![300.0, 310.0, 290.0],
            peers: [vec![150.0], vec![10.0]],
            ..Figure::new("decode", "tok/s", Some(600.0))
        };
        let start = Figure {
            ours: vec![0.256],
            ..Figure::new("start", "s", None)
        };
        assert_eq!(
            table(&[decode.clone(), start]),
            "figure  unit   ours  llama.cpp  ratio  mlx-lm  ratio  limit  of it\n\
             decode  tok/s   300        150   2.00    10.0  30.00    600    50%\n\
             start   s      0.26          -      -       -      -      -      -\n"
        );
        let told = decode.json();
        assert_eq!(told["peers"]["mlx-lm"]["ratio"], 30.0);
        assert_eq!(told["ours"], 300.0);
    }
}
