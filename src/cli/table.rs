//! Tables on standard output.

use super::output::print_line;
use super::printable;
use crate::Result;
use comfy_table::{
    Attribute, Cell, CellAlignment, ContentArrangement, LineStyle, Table as Grid, TableStyle,
};
use std::fmt;

pub(super) use crate::report::markdown::Column;

/// A rule under the heading and nothing else.
const STYLE: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// A table whose numbers stand at the right of their column.
///
/// On a terminal it fits its width and its headings are bold; elsewhere it is plain text of any width.
#[derive(Debug, Clone)]
pub(super) struct Table {
    grid: Grid,
    alignments: Vec<CellAlignment>,
}

impl Table {
    /// An empty table with these columns.
    pub(super) fn new(columns: &[Column]) -> Self {
        let mut headings = Vec::new();
        let mut alignments = Vec::new();
        for column in columns {
            let (name, alignment) = match column {
                Column::Text(name) => (name, CellAlignment::Left),
                Column::Number(name) => (name, CellAlignment::Right),
            };
            headings.push(
                Cell::new(name)
                    .set_alignment(alignment)
                    .add_attribute(Attribute::Bold),
            );
            alignments.push(alignment);
        }
        let mut table = Self::without_heading(alignments);
        table.grid.set_header(headings);
        table
    }

    /// Names and what they stand for, a pair on each line.
    pub(super) fn facts<Name: Into<String>, Fact: Into<String>>(
        facts: impl IntoIterator<Item = (Name, Fact)>,
    ) -> Self {
        let mut table = Self::without_heading(vec![CellAlignment::Left; 2]);
        for (name, fact) in facts {
            table.row([name.into(), fact.into()]);
        }
        table
    }

    /// Adds a row: a cell for each column. A cell may quote a stranger's file.
    pub(super) fn row<Text: Into<String>>(&mut self, cells: impl IntoIterator<Item = Text>) {
        let cells = cells.into_iter().zip(&self.alignments);
        let cells: Vec<_> = cells
            .map(|(text, alignment)| {
                let text: String = text.into();
                Cell::new(printable(&text)).set_alignment(*alignment)
            })
            .collect();
        self.grid.add_row(cells);
    }

    /// Writes the table to standard output. When nobody reads it any more, as under `head`, that is no error.
    pub(super) fn print(&self) -> Result<()> {
        print_line!("{}", render(self.grid.clone()))
    }

    fn without_heading(alignments: Vec<CellAlignment>) -> Self {
        let mut grid = Grid::new();
        grid.load_style(STYLE)
            .set_content_arrangement(ContentArrangement::Dynamic);
        Self { grid, alignments }
    }
}

/// Plain text, wherever it goes.
impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut grid = self.grid.clone();
        grid.force_no_tty();
        formatter.write_str(&render(grid))
    }
}

fn render(mut grid: Grid) -> String {
    // Columns can be set only once there are cells. Each ends in a blank, and the grid puts one between two.
    for column in grid.column_iter_mut() {
        column.set_padding((0, 1));
    }
    grid.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_at_the_right() {
        let columns = [
            Column::Text("method"),
            Column::Number("trained weights"),
            Column::Number("eval loss"),
            Column::Text("note"),
        ];
        let mut table = Table::new(&columns);
        table.row(["lora", "541 k", "1.2345", ""]);
        table.row(["last-layers", "14.9 M", "-", "slow"]);
        insta::assert_snapshot!(table, @r"
        method       trained weights  eval loss  note
        ──────────────────────────────────────────────
        lora                   541 k     1.2345
        last-layers           14.9 M          -  slow
        ");
    }

    #[test]
    fn facts_have_no_heading() {
        let table = Table::facts([("rank", "8".to_owned()), ("base model", "tiny".to_owned())]);
        insta::assert_snapshot!(table, @r"
        rank        8
        base model  tiny
        ");
    }

    #[test]
    fn a_table_without_rows_is_its_heading() {
        let table = Table::new(&[Column::Text("method"), Column::Number("loss")]);
        insta::assert_snapshot!(table, @r"
        method  loss
        ─────────────
        ");
    }
}
