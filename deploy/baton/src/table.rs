//! Aligned columns of text.

use std::fmt;

/// A table with a head. The first column is set left, the others right, except those named in `left`.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    left: &'static [&'static str],
}

impl Table {
    pub(crate) fn new(head: &[&str], left: &'static [&'static str]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()], left }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.rows[0].len());
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = &self.rows[0];
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if column > 0 {
                    line.push_str("  ");
                }
                let pad = " ".repeat(width - cell.chars().count());
                if column == 0 || self.left.contains(&head[column].as_str()) {
                    line.push_str(cell);
                    line.push_str(&pad);
                } else {
                    line.push_str(&pad);
                    line.push_str(cell);
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["id", "ms", "why"], &["why"]);
        table.row(vec!["e0".into(), "12.5".into(), "é".into()]);
        table.row(vec!["e10".into(), "3".into(), "longer".into()]);
        assert_eq!(table.to_string(), "id     ms  why\ne0   12.5  é\ne10     3  longer\n");
    }
}
