//! Tables on stdout.

use comfy_table::{CellAlignment, Table, presets};

use crate::failure::Failure;
use crate::output::outln;

/// Prints rows in columns below their names; the columns named in `right` hold numbers.
pub(crate) fn print(names: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(names.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in table.lines() {
        outln!("{}", line.trim_end());
    }
    Ok(())
}

/// A size for people.
pub(crate) fn size(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}
