//! What `retune compare` prints: the base's line, and one for each method.

use crate::cli::table::{Column, Table};
use crate::compare::Row;
use crate::report::format;

/// One line for each method; with several seeds the means, and the spread of the best loss.
pub(super) fn table(rows: &[Row]) -> Table {
    let has = |value: fn(&Row) -> Option<f64>| rows.iter().any(|row| value(row).is_some());
    let (exact, unrelated) = (has(|row| row.exact_match), has(|row| row.unrelated_loss));
    let mut columns = vec![
        Column::Text("method"),
        Column::Number("trained"),
        Column::Number("adapter"),
        Column::Number("best loss"),
        Column::Number("final loss"),
        Column::Number("accuracy"),
    ];
    if exact {
        columns.push(Column::Number("exact match"));
    }
    if unrelated {
        columns.push(Column::Number("unrelated"));
        columns.push(Column::Number("forgetting"));
    }
    columns.extend([
        Column::Number("tokens/s"),
        Column::Number("time"),
        Column::Number("peak memory"),
    ]);
    let mut table = Table::new(&columns);
    let mut labels: Vec<&str> = Vec::new();
    for row in rows {
        if !labels.contains(&row.method.as_str()) {
            labels.push(&row.method);
        }
    }
    for label in labels {
        let (failed, same): (Vec<&Row>, Vec<&Row>) = rows
            .iter()
            .filter(|row| row.method == label)
            .partition(|row| row.failed.is_some());
        if !same.is_empty() {
            table.row(cells(&same, exact, unrelated));
        }
        if !failed.is_empty() {
            let mut cells = vec!["-".to_owned(); columns.len()];
            cells[0] = label.to_owned();
            cells[3] = "failed".to_owned();
            table.row(cells);
        }
    }
    table
}

/// Four decimals; what rounds to zero has no sign.
pub(super) fn decimals(value: f64) -> String {
    let text = format!("{value:.4}");
    if text == "-0.0000" {
        return "0.0000".to_owned();
    }
    text
}

/// The same for a difference: what rose has a sign too.
fn difference(value: f64) -> String {
    match decimals(value) {
        text if value > 0.0 && text != "0.0000" => format!("+{text}"),
        text => text,
    }
}

fn cells(rows: &[&Row], exact: bool, unrelated: bool) -> Vec<String> {
    let count = rows.len() as f64;
    let mean = |value: &dyn Fn(&Row) -> f64| rows.iter().map(|row| value(row)).sum::<f64>() / count;
    let known = |value: fn(&Row) -> Option<f64>| mean(&|row| value(row).unwrap_or(f64::NAN));
    let trained = rows[0].trainable_parameters > 0;
    let of_training = |text: String| if trained { text } else { "-".to_owned() };
    let best = mean(&|row| row.best_eval_loss);
    let mut best_text = decimals(best);
    if rows.len() > 1 {
        let variance = mean(&|row| (row.best_eval_loss - best).powi(2)) * count / (count - 1.0);
        best_text += &format!(" ± {:.4}", variance.sqrt());
    }
    let mut cells = vec![
        rows[0].method.clone(),
        format::whole(rows[0].trainable_parameters as u64),
        of_training(format::bytes(rows[0].adapter_bytes)),
        best_text,
        decimals(mean(&|row| row.final_eval_loss)),
        format!("{:.1} %", 100.0 * mean(&|row| row.token_accuracy)),
    ];
    if exact {
        cells.push(format!("{:.1} %", 100.0 * known(|row| row.exact_match)));
    }
    if unrelated {
        cells.push(decimals(known(|row| row.unrelated_loss)));
        cells.push(of_training(difference(known(|row| row.forgetting))));
    }
    cells.push(of_training(format!(
        "{:.0}",
        mean(&|row| row.tokens_per_second)
    )));
    cells.push(of_training(format::duration(format::seconds(mean(
        &|row| row.seconds,
    )))));
    cells.push(format::bytes(
        mean(&|row| row.peak_memory_bytes as f64) as u64
    ));
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_has_no_sign() {
        assert_eq!(decimals(-0.000_01), "0.0000");
        assert_eq!(decimals(-0.0), "0.0000");
        assert_eq!(decimals(1.5), "1.5000");
        for (value, text) in [
            (0.0, "0.0000"),
            (-0.0, "0.0000"),
            (-0.000_01, "0.0000"),
            (0.000_01, "0.0000"),
            (0.25, "+0.2500"),
            (-0.25, "-0.2500"),
        ] {
            assert_eq!(difference(value), text);
        }
    }
}
