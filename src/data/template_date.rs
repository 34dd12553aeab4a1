//! The date that a chat template reads: fixed when it begins to be used, and written down with what was made by it.

use crate::{Error, Result};
use regex::Regex;
use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;
use time::{Date, Month, OffsetDateTime};

/// A date and time to the second, in text as `2026-11-22T10:00:00`. A date alone is its midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TemplateDate(OffsetDateTime);

impl TemplateDate {
    /// The present one, in UTC.
    pub fn now() -> Self {
        Self(OffsetDateTime::now_utc().truncate_to_second())
    }

    /// The date as the library of dates has it.
    pub(super) fn date_time(self) -> OffsetDateTime {
        self.0
    }
}

impl fmt::Display for TemplateDate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(date) = self;
        write!(
            formatter,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
            date.year(),
            u8::from(date.month()),
            date.day(),
            date.hour(),
            date.minute(),
            date.second()
        )
    }
}

impl FromStr for TemplateDate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let date = parsed(text);
        date.map(Self).ok_or_else(|| {
            Error::usage("expected a date and time of the calendar, such as 2026-11-22T10:00:00")
        })
    }
}

fn parsed(text: &str) -> Option<OffsetDateTime> {
    static FORM: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"^([0-9]{4})-([0-9]{2})-([0-9]{2})(?:T([0-9]{2}):([0-9]{2}):([0-9]{2}))?$")
            .expect("a pattern written here")
    });
    let parts = FORM.captures(text)?;
    let number = |part: usize| match parts.get(part) {
        Some(digits) => digits.as_str().parse::<u8>().ok(),
        None => Some(0),
    };
    let year = parts.get(1)?.as_str().parse().ok()?;
    let month = Month::try_from(number(2)?).ok()?;
    let date = Date::from_calendar_date(year, month, number(3)?).ok()?;
    let date = date.with_hms(number(4)?, number(5)?, number(6)?).ok()?;
    Some(date.assume_utc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_read_as_it_is_written() -> Result<()> {
        for text in [
            "2026-11-22T10:00:00",
            "2024-02-29T23:59:59",
            "0001-01-01T00:00:00",
        ] {
            assert_eq!(text.parse::<TemplateDate>()?.to_string(), text);
        }
        let midnight: TemplateDate = "2026-11-22".parse()?;
        assert_eq!(midnight.to_string(), "2026-11-22T00:00:00");
        let now = TemplateDate::now();
        assert_eq!(now.to_string().parse::<TemplateDate>()?, now);
        Ok(())
    }

    #[test]
    fn what_is_no_date_of_the_calendar_is_refused() {
        for text in [
            "",
            "2026",
            "2026-13-01",
            "2025-02-29",
            "2026-11-22T24:00:00",
            "2026-11-22T10:00",
            "2026-11-22 10:00:00",
            "22-11-2026",
            "2026-11-22T10:00:00Z",
            "2026-11-22\n",
        ] {
            assert!(text.parse::<TemplateDate>().is_err(), "{text:?}");
        }
    }
}
