//! Markdown tables.

use std::fmt::Write as _;

/// How a column is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column<'a> {
    /// Words, from the left.
    Text(&'a str),
    /// Numbers, from the right.
    Number(&'a str),
}

/// A table with a heading for each column; cells may hold any text.
pub fn table<Row: AsRef<[String]>>(columns: &[Column], rows: &[Row]) -> String {
    let mut text = String::new();
    let mut rule = String::from("|");
    let mut heading = Vec::new();
    for column in columns {
        let (name, line) = match column {
            Column::Text(name) => (name, " --- |"),
            Column::Number(name) => (name, " ---: |"),
        };
        heading.push((*name).to_owned());
        rule.push_str(line);
    }
    line(&mut text, &heading);
    text.push_str(&rule);
    text.push('\n');
    for row in rows {
        line(&mut text, row.as_ref());
    }
    text
}

fn line(text: &mut String, cells: &[String]) {
    text.push('|');
    for cell in cells {
        let cell = cell.replace('|', "\\|").replace(['\n', '\r'], " ");
        // Writing to a string cannot fail.
        let _ = write!(text, " {cell} |");
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_columns_and_escapes_bars() {
        let rows = [["a|b\nc".to_owned(), "1".to_owned()]];
        let text = table(&[Column::Text("name"), Column::Number("value")], &rows);
        assert_eq!(text, "| name | value |\n| --- | ---: |\n| a\\|b c | 1 |\n");
    }
}
