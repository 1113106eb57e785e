//! The report: one HTML file that needs no other.

use std::fmt::Write as _;

use super::chart::escape;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222;background:#fff}\
h1{font-size:1.6em}h2{margin-top:2em;border-bottom:1px solid #ccc;font-size:1.25em}h3{font-size:1.05em}\
table{border-collapse:collapse;margin:.8em 0;font-size:13px}th,td{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}\
th:first-child,td:first-child,td.l,th.l{text-align:left}.figures{display:flex;flex-wrap:wrap;gap:12px}\
svg{font:11px system-ui,sans-serif;max-width:100%;height:auto}svg .t{font-size:13px;font-weight:600}svg .g{stroke:#ddd}\
svg text{fill:#222}code{background:#f2f2f2;padding:0 .25em}.note{color:#555;font-size:13px}\
@media(prefers-color-scheme:dark){body{background:#16181c;color:#ddd}svg text{fill:#ddd}svg .g{stroke:#444}svg .k{fill:#222}code{background:#2a2d33}th,td{border-color:#444}.note{color:#aaa}}";

/// A page that grows section by section.
#[derive(Clone, Debug)]
pub struct Page {
    html: String,
}

impl Page {
    /// A page with this heading.
    pub fn new(title: &str) -> Self {
        let title = escape(title);
        Self {
            html: format!(
                "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
            ),
        }
    }

    /// Begins a section.
    pub fn section(&mut self, title: &str) {
        let _ = writeln!(self.html, "<h2>{}</h2>", escape(title));
    }

    /// Begins a part of a section.
    pub fn part(&mut self, title: &str) {
        let _ = writeln!(self.html, "<h3>{}</h3>", escape(title));
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) {
        let _ = writeln!(self.html, "<p>{}</p>", escape(text));
    }

    /// A paragraph in small print.
    pub fn note(&mut self, text: &str) {
        let _ = writeln!(self.html, "<p class=\"note\">{}</p>", escape(text));
    }

    /// A command line.
    pub fn code(&mut self, text: &str) {
        let _ = writeln!(self.html, "<p><code>{}</code></p>", escape(text));
    }

    /// Rows below a head. The first column is set left, and so are those whose head begins with a `<`, which is not shown.
    pub fn table(&mut self, head: &[&str], rows: &[Vec<String>]) {
        let left: Vec<bool> = head.iter().map(|name| name.starts_with('<')).collect();
        let class = |at: usize| if left.get(at).copied().unwrap_or(false) { " class=\"l\"" } else { "" };
        self.html.push_str("<table><tr>");
        for (at, name) in head.iter().enumerate() {
            let _ = write!(self.html, "<th{}>{}</th>", class(at), escape(name.trim_start_matches('<')));
        }
        self.html.push_str("</tr>");
        for row in rows {
            self.html.push_str("<tr>");
            for (at, cell) in row.iter().enumerate() {
                let _ = write!(self.html, "<td{}>{}</td>", class(at), escape(cell));
            }
            self.html.push_str("</tr>");
        }
        self.html.push_str("</table>\n");
    }

    /// Plots side by side, as far as there is room.
    pub fn figures(&mut self, svgs: &[String]) {
        self.html.push_str("<div class=\"figures\">");
        svgs.iter().for_each(|svg| self.html.push_str(svg));
        self.html.push_str("</div>\n");
    }

    /// The whole text.
    pub fn finish(mut self) -> String {
        self.html.push_str("</body></html>\n");
        self.html
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_and_fetches_nothing() {
        let mut page = Page::new("a <b>");
        page.section("s");
        page.table(&["mode", "<why"], &[vec!["x".into(), "1 < 2".into()]]);
        page.figures(&["<svg></svg>".into()]);
        let html = page.finish();
        assert!(html.contains("a &lt;b&gt;") && html.contains("<td class=\"l\">1 &lt; 2</td>"));
        assert!(html.ends_with("</body></html>\n") && !html.contains("src=") && !html.contains("href="));
    }
}
