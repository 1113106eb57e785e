//! Plots as SVG, without anything that a browser would have to fetch. The same data give the same text.

use std::fmt::Write as _;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 320.0;
/// Room around the plot: left, right, top, bottom.
const MARGIN: (f64, f64, f64, f64) = (62.0, 14.0, 30.0, 44.0);
/// Colours of series, told apart also by most who see few colours (after Okabe and Ito, 2008), and lighter ones of the same order.
const COLOURS: [&str; 12] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#8c564b", "#7f7f7f",
    "#17becf", "#bcbd22", "#1b1b1b",
];

/// Text as it stands in HTML and SVG.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A number with as many digits as matter: three.
pub fn number(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if !value.is_finite() => "–".to_owned(),
        0.0 => "0".to_owned(),
        1e6.. => format!("{:.1}M", value / 1e6),
        1e4.. => format!("{:.0}k", value / 1e3),
        100.0.. => format!("{value:.0}"),
        10.0.. => trimmed(format!("{value:.1}")),
        1.0.. => trimmed(format!("{value:.2}")),
        _ => trimmed(format!("{value:.3}")),
    }
}

fn trimmed(text: String) -> String {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// How values lie along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Evenly, from 0.
    Linear,
    /// By their logarithm. What is not positive is left out.
    Log,
}

/// An axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows, with its unit.
    pub label: String,
    /// How.
    pub scale: Scale,
    /// Its end, where that is not the largest value's.
    pub most: Option<f64>,
}

impl Axis {
    /// An axis that ends at its largest value.
    pub fn new(label: &str, scale: Scale) -> Self {
        Self { label: label.to_owned(), scale, most: None }
    }

    /// A share, from 0 to 1.
    pub fn share(label: &str) -> Self {
        Self { label: label.to_owned(), scale: Scale::Linear, most: Some(1.0) }
    }
}

/// Lines over two axes.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// Names and points.
    pub series: Vec<(String, Vec<(f64, f64)>)>,
    /// Whether points are marked.
    pub marks: bool,
}

/// Values of an axis as places.
struct Range {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Range {
    fn new(axis: &Axis, values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let of = values.filter(|value| value.is_finite() && (axis.scale == Scale::Linear || *value > 0.0));
        let most = axis.most.unwrap_or_else(|| of.clone().fold(0.0, f64::max));
        let (low, high) = match axis.scale {
            Scale::Linear => (0.0, if most > 0.0 { most } else { 1.0 }),
            Scale::Log => {
                let least = of.fold(f64::INFINITY, f64::min);
                let (least, most) = if least.is_finite() { (least, most) } else { (1.0, 10.0) };
                (least, if most > least * 1.5 { most } else { least * 1.5 })
            }
        };
        Self { scale: axis.scale, low, high, from, to }
    }

    fn place(&self, value: f64) -> Option<f64> {
        let part = match self.scale {
            Scale::Linear => value / self.high,
            Scale::Log if value <= 0.0 => return None,
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        let sound = part.is_finite().then_some(part.clamp(0.0, 1.0));
        sound.map(|part| self.from + part * (self.to - self.from))
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let rough = self.high / 5.0;
                let power = 10f64.powf(rough.log10().floor());
                let steps = [1.0, 2.0, 2.5, 5.0, 10.0];
                let step = steps.into_iter().map(|step| step * power).find(|step| *step >= rough * 0.999);
                let step = step.unwrap_or(rough);
                (0..=10).map(|at| f64::from(at) * step).filter(|tick| *tick <= self.high * 1.0001).collect()
            }
            Scale::Log => {
                let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
                let wide = last - first > 3;
                let parts: &[f64] = if wide { &[1.0] } else { &[1.0, 2.0, 5.0] };
                let all =
                    (first..=last).flat_map(|power| parts.iter().map(move |part| part * 10f64.powi(power)));
                all.filter(|tick| (self.low * 0.999..=self.high * 1.001).contains(tick)).collect()
            }
        }
    }
}

impl Chart {
    /// The plot, its legend below it.
    pub fn svg(&self) -> String {
        let (left, right, top, bottom) = MARGIN;
        let points = || self.series.iter().flat_map(|series| series.1.iter());
        let x = Range::new(&self.x, points().map(|point| point.0), left, WIDTH - right);
        let y = Range::new(&self.y, points().map(|point| point.1), HEIGHT - bottom, top);
        let legend_rows = self.series.len().div_ceil(3);
        let height = HEIGHT + 18.0 * legend_rows as f64;
        let mut svg = open(WIDTH, height, &self.title);
        for tick in x.ticks() {
            let Some(at) = x.place(tick) else { continue };
            let _ = write!(
                svg,
                "<line class=\"g\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{:.1}\"/>\
                 <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                HEIGHT - bottom,
                HEIGHT - bottom + 15.0,
                number(tick)
            );
        }
        for tick in y.ticks() {
            let Some(at) = y.place(tick) else { continue };
            let _ = write!(
                svg,
                "<line class=\"g\" x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - right,
                left - 6.0,
                at + 4.0,
                number(tick)
            );
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text transform=\"translate(14,{:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            (left + WIDTH - right) / 2.0,
            HEIGHT - 8.0,
            escape(&self.x.label),
            (top + HEIGHT - bottom) / 2.0,
            escape(&self.y.label)
        );
        for (at, (name, points)) in self.series.iter().enumerate() {
            let colour = COLOURS[at % COLOURS.len()];
            let placed: Vec<(f64, f64)> =
                points.iter().filter_map(|point| Some((x.place(point.0)?, y.place(point.1)?))).collect();
            svg.push_str("<polyline fill=\"none\" stroke-width=\"1.8\" stroke=\"");
            svg.push_str(colour);
            svg.push_str("\" points=\"");
            for (x, y) in &placed {
                let _ = write!(svg, "{x:.1},{y:.1} ");
            }
            svg.push_str("\"/>");
            for (x, y) in placed.iter().filter(|_| self.marks) {
                let _ = write!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\" fill=\"{colour}\"/>");
            }
            let (column, row) = ((at % 3) as f64, (at / 3) as f64);
            let (lx, ly) = (left + column * 165.0, HEIGHT + 6.0 + 18.0 * row);
            let _ = write!(
                svg,
                "<rect x=\"{lx:.1}\" y=\"{:.1}\" width=\"12\" height=\"4\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                ly - 4.0,
                lx + 17.0,
                ly + 2.0,
                escape(name)
            );
        }
        svg.push_str("</svg>");
        svg
    }
}

/// Named bars, each in as many parts as there are series.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Above it.
    pub title: String,
    /// What their length is, with its unit.
    pub label: String,
    /// Names of the parts; empty where there is one part.
    pub parts: Vec<String>,
    /// Names of the bars, and their parts.
    pub bars: Vec<(String, Vec<f64>)>,
}

impl Bars {
    /// The plot.
    pub fn svg(&self) -> String {
        let (left, row) = (130.0, 22.0);
        let most = self.bars.iter().map(|bar| bar.1.iter().sum::<f64>()).fold(0.0, f64::max);
        let legend = if self.parts.is_empty() { 0.0 } else { 20.0 };
        let height = 58.0 + row * self.bars.len() as f64 + legend;
        let mut svg = open(WIDTH, height, &self.title);
        let room = WIDTH - left - 70.0;
        for (at, (name, parts)) in self.bars.iter().enumerate() {
            let y = 32.0 + row * at as f64;
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 8.0,
                y + 12.0,
                escape(name)
            );
            let mut x = left;
            for (part, value) in parts.iter().enumerate() {
                let width = if most > 0.0 { room * value.max(0.0) / most } else { 0.0 };
                let colour = COLOURS[part % COLOURS.len()];
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"15\" fill=\"{colour}\"/>"
                );
                x += width;
            }
            let total: f64 = parts.iter().sum();
            let _ = write!(svg, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", x + 6.0, y + 12.0, number(total));
        }
        let below = 32.0 + row * self.bars.len() as f64;
        for (at, name) in self.parts.iter().enumerate() {
            let x = left + 130.0 * at as f64;
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"12\" height=\"8\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                below + 4.0,
                COLOURS[at % COLOURS.len()],
                x + 17.0,
                below + 12.0,
                escape(name)
            );
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></svg>",
            left + room / 2.0,
            height - 8.0,
            escape(&self.label)
        );
        svg
    }
}

/// A field of a map.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// From -1 (orange) over 0 (white) to 1 (blue).
    pub value: f64,
    /// What stands in it, in up to two lines.
    pub text: [String; 2],
}

/// Coloured fields in rows and columns.
#[derive(Clone, Debug)]
pub struct Map {
    /// Above it.
    pub title: String,
    /// What rows are, and columns.
    pub labels: [String; 2],
    /// Names of rows.
    pub rows: Vec<String>,
    /// Names of columns.
    pub columns: Vec<String>,
    /// Row by row.
    pub fields: Vec<Vec<Option<Field>>>,
}

impl Map {
    /// The plot.
    pub fn svg(&self) -> String {
        let (left, top, wide, high) = (84.0, 52.0, 96.0, 40.0);
        let width = left + wide * self.columns.len() as f64 + 10.0;
        let height = top + high * self.rows.len() as f64 + 30.0;
        let mut svg = open(width, height, &self.title);
        for (at, name) in self.columns.iter().enumerate() {
            let x = left + wide * (at as f64 + 0.5);
            let _ = write!(svg, "<text x=\"{x:.1}\" y=\"44\" text-anchor=\"middle\">{}</text>", escape(name));
        }
        for (row, name) in self.rows.iter().enumerate() {
            let y = top + high * row as f64;
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 8.0,
                y + high / 2.0 + 4.0,
                escape(name)
            );
            for (column, field) in self.fields[row].iter().enumerate() {
                let x = left + wide * column as f64;
                let fill = field.as_ref().map_or_else(|| "none".to_owned(), |field| shade(field.value));
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{fill}\" stroke=\"#999\"/>",
                    wide - 2.0,
                    high - 2.0
                );
                for (line, text) in field.iter().flat_map(|field| field.text.iter().enumerate()) {
                    let _ = write!(
                        svg,
                        "<text class=\"k\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                        x + wide / 2.0,
                        y + 16.0 + 14.0 * line as f64,
                        escape(text)
                    );
                }
            }
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}, rows: {}</text></svg>",
            width / 2.0,
            height - 10.0,
            escape(&self.labels[1]),
            escape(&self.labels[0])
        );
        svg
    }
}

/// Orange for -1, white for 0, blue for 1.
fn shade(value: f64) -> String {
    let part = value.clamp(-1.0, 1.0);
    let (r, g, b) = if part < 0.0 { (240.0, 150.0, 60.0) } else { (90.0, 160.0, 220.0) };
    let mixed = |to: f64| (255.0 + (to - 255.0) * part.abs()).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mixed(r), mixed(g), mixed(b))
}

fn open(width: f64, height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" role=\"img\">\
         <title>{0}</title><text class=\"t\" x=\"10\" y=\"18\">{0}</text>",
        escape(title)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_they_belong() {
        let axis = Axis::new("ms", Scale::Log);
        let range = Range::new(&axis, [1.0, 100.0].into_iter(), 0.0, 200.0);
        assert_eq!(range.place(10.0), Some(100.0));
        assert_eq!((range.place(0.0), range.place(1000.0)), (None, Some(200.0)));
        assert_eq!(range.ticks(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        let linear = Range::new(&Axis::share("share"), [0.3].into_iter(), 100.0, 0.0);
        assert_eq!((linear.place(0.25), linear.ticks().len()), (Some(75.0), 6));
    }

    #[test]
    fn nothing_breaks_a_plot() {
        let chart = |points: Vec<(f64, f64)>| {
            let (x, y) = (Axis::new("<x>", Scale::Log), Axis::new("y & z", Scale::Linear));
            Chart { title: "t".into(), x, y, series: vec![("s".into(), points)], marks: true }.svg()
        };
        for points in
            [vec![], vec![(0.0, 0.0)], vec![(1.0, f64::NAN), (f64::INFINITY, 1.0)], vec![(5.0, 5.0)]]
        {
            let svg = chart(points);
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.contains("&lt;x&gt;") && svg.contains("y &amp; z"));
        }
    }

    #[test]
    fn numbers_have_three_digits() {
        let shown = [0.0, 0.04567, 1.2, 45.67, 456.7, 45_670.0, 4_567_000.0].map(number);
        assert_eq!(shown, ["0", "0.046", "1.2", "45.7", "457", "46k", "4.6M"]);
    }
}
