//! Curves as pictures: the same drawing as SVG, and as PNG for where SVG is not shown.

use std::fs;
use std::io::BufWriter;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::curves::Curve;
use super::report::median;
use crate::error::{Context, Error, Result};

/// Pixels: two rows, prefill above decode, a column for each thing that they are measured against.
const SIZE: (u32, u32) = (1440, 900);
/// Told apart by who does not tell red from green too (Okabe and Ito's).
const OURS: RGBColor = RGBColor(0, 114, 178);
const LLAMA: RGBColor = RGBColor(230, 159, 0);
/// The only font, so that the pictures are alike where there are no fonts.
const FONT: &str = "sans-serif";

/// Draws the curves into `speed.svg` and `speed.png` of a folder.
pub(crate) fn write(folder: &Path, title: &str, curves: &[Curve; 6]) -> Result<()> {
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| Error::Refused("the font of the pictures cannot be read".to_owned()))?;
    let mut svg = String::new();
    draw(SVGBackend::with_string(&mut svg, SIZE), title, curves)?;
    place(folder, "speed.svg", svg.as_bytes())?;
    let mut pixels = vec![0; SIZE.0 as usize * SIZE.1 as usize * 3];
    draw(BitMapBackend::with_buffer(&mut pixels, SIZE), title, curves)?;
    let mut file = Vec::new();
    encode(&mut file, &pixels)
        .map_err(|error| Error::Refused(format!("the picture cannot be packed as PNG: {error}")))?;
    place(folder, "speed.png", &file)
}

fn place(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    let partial = folder.join(format!("{name}.partial"));
    fs::write(&partial, bytes).context("write", &partial)?;
    fs::rename(&partial, &path).context("put in place", &path)
}

fn encode(file: &mut Vec<u8>, pixels: &[u8]) -> std::result::Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(BufWriter::new(file), SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(pixels)
}

fn draw<B: DrawingBackend>(backend: B, title: &str, curves: &[Curve; 6]) -> Result<()> {
    let paint = || -> std::result::Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let area = backend.into_drawing_area();
        area.fill(&WHITE)?;
        let area = area.titled(title, (FONT, 22))?;
        // Filled column by column: the curves come in pairs.
        let panels = area.split_evenly((2, 3));
        for (at, curve) in curves.iter().enumerate() {
            panel(&panels[at % 2 * 3 + at / 2], curve)?;
        }
        area.present()
    };
    paint().map_err(|error| Error::Refused(format!("the curves cannot be drawn: {error}")))
}

fn panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    curve: &Curve,
) -> std::result::Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let series = [("ours", OURS, &curve.ours), ("llama.cpp", LLAMA, &curve.llama)];
    let points = |rounds: &[Vec<f64>]| -> Vec<(f64, f64)> {
        let places = curve.at.iter().zip(rounds);
        places
            .filter_map(|(at, rounds)| Some((f64::from(*at), median(rounds)?)))
            .collect()
    };
    let highest = series
        .iter()
        .flat_map(|(_, _, rounds)| points(rounds))
        .map(|(_, speed)| speed)
        .fold(1.0, f64::max);
    let last = curve.at.iter().copied().max().unwrap_or(1);
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{} by {}", curve.speed, curve.against), (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..f64::from(last) * 1.05, 0.0..highest * 1.15)?;
    chart
        .configure_mesh()
        .x_desc(curve.against)
        .y_desc("tokens a second")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .x_labels((last as usize + 1).min(9))
        .label_style((FONT, 14))
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .draw()?;
    for (name, colour, rounds) in series {
        let points = points(rounds);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .label_font((FONT, 14))
        .draw()
}

#[cfg(test)]
mod tests {
    use super::super::curves::empty;
    use super::*;

    #[test]
    fn pictures_show_both_and_have_their_size() {
        let mut curves = empty(2);
        for curve in &mut curves {
            for (at, place) in curve.at.iter().enumerate() {
                curve.ours[at].push(f64::from(*place) + 100.0);
                curve.llama[at].push(50.0);
            }
        }
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "A machine", &curves).unwrap();
        let svg = fs::read_to_string(folder.path().join("speed.svg")).unwrap();
        for word in [
            "A machine",
            "prefill by streams",
            "decode by threads",
            "llama.cpp",
        ] {
            assert!(svg.contains(word), "{word}");
        }
        let file = fs::File::open(folder.path().join("speed.png")).unwrap();
        let mut picture = png::Decoder::new(std::io::BufReader::new(file))
            .read_info()
            .unwrap();
        assert_eq!((picture.info().width, picture.info().height), SIZE);
        let mut pixels = vec![0; picture.output_buffer_size().unwrap()];
        picture.next_frame(&mut pixels).unwrap();
        let seen = |colour: RGBColor| {
            let rgb = [colour.0, colour.1, colour.2];
            pixels.chunks_exact(3).filter(|pixel| **pixel == rgb).count()
        };
        assert!(seen(OURS) > 500 && seen(LLAMA) > 500);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn nothing_measured_is_an_empty_picture() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "", &empty(1)).unwrap();
        assert!(folder.path().join("speed.png").is_file());
    }
}
