//! A table of cells as text, for every kind of page.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use maud::{Markup, html};

use super::markup::{isolated, visible};

/// A table whose first column is of names, and all others of numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// What the table shows.
    pub title: String,
    /// Titles of the columns.
    pub header: Vec<String>,
    /// As many cells for each row as there are titles.
    pub rows: Vec<Vec<String>>,
}

impl Grid {
    /// For a terminal: the title, and the cells with numbers aligned to the right.
    pub(super) fn plain(self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING).set_header(&self.header);
        for cells in self.rows {
            table.add_row(cells.into_iter().map(|cell| cell.replace(char::is_control, " ")));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!("{}:\n\n{}\n", self.title.replace(char::is_control, " "), table.trim_fmt())
    }

    /// A section of the page, under `heading` and below `figure`.
    pub(super) fn section(&self, heading: &str, figure: &Markup) -> Markup {
        let Grid { title, header, rows } = self;
        html! {
            section {
                h2 { (heading) }
                (figure)
                p { (isolated(title)) "." }
                div.layers.scroll {
                    table {
                        thead {
                            tr {
                                @for (index, title) in header.iter().enumerate() {
                                    th.left[index == 0] scope="col" { (visible(title)) }
                                }
                            }
                        }
                        tbody {
                            @for cells in rows {
                                tr {
                                    @for (index, cell) in cells.iter().enumerate() { td.left[index == 0] { (visible(cell)) } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
