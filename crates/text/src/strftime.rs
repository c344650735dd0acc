//! Dates for templates.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Formats a time in UTC as Python's `strftime` does in the C locale. A conversion that is not known stays as it is.
pub(crate) fn strftime(format: &str, time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil(days);
    let day_of_year = days - days_before(year) + 1;
    let (weekday, month_name) = (DAYS[(days + 4) as usize % 7], MONTHS[month as usize - 1]);
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut conversion = characters.next();
        let plain = conversion == Some('-');
        if plain {
            conversion = characters.next();
        }
        let number = match conversion {
            Some('Y') => (year, 4),
            Some('y') => (year % 100, 2),
            Some('m') => (month, 2),
            Some('d') => (day, 2),
            Some('H') => (hour, 2),
            Some('I') => (hour12, 2),
            Some('M') => (minute, 2),
            Some('S') => (second, 2),
            Some('j') => (day_of_year, 3),
            other => {
                match other {
                    Some('B') => out.push_str(month_name),
                    Some('b') => out.push_str(&month_name[..3]),
                    Some('A') => out.push_str(weekday),
                    Some('a') => out.push_str(&weekday[..3]),
                    Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
                    Some('Z') => out.push_str("UTC"),
                    Some(other) if other != '%' => out.extend(['%', other]),
                    _ => out.push('%'),
                }
                continue;
            }
        };
        let width = if plain { 1 } else { number.1 };
        // Writing to a string does not fail.
        let _ = write!(out, "{:0width$}", number.0);
    }
    out
}

/// The year, month and day of a day since 1970, by Howard Hinnant's `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Days from 1970 to the first of January of a year.
fn days_before(year: u64) -> u64 {
    let before = year - 1;
    365 * (year - 1970) + (before / 4 - before / 100 + before / 400) - 477
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_python() {
        // datetime.fromtimestamp(t, timezone.utc).strftime(...)
        let check = |seconds, format, expect: &str| {
            assert_eq!(
                strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)),
                expect
            );
        };
        check(0, "%Y-%m-%d %H:%M:%S %A %j", "1970-01-01 00:00:00 Thursday 001");
        check(951_782_400, "%d %b %Y %a %j", "29 Feb 2000 Tue 060");
        check(
            1_735_689_599,
            "%B %-d, %Y %I:%M %p %y %j",
            "December 31, 2024 11:59 PM 24 366",
        );
        check(1_784_548_800, "100%% %q %", "100% %q %");
    }
}
