"use strict";
(() => {
  const { plots, curves } = JSON.parse(document.getElementById("report-data").textContent);
  const find = (id) => document.getElementById(id);

  // What the plots of the chosen label are drawn from, by the names of their sources.
  function sourcesOf(curve, point) {
    const { positive, negative } = curve.histogram;
    const total = (counts) => counts.reduce((sum, value) => sum + value, 0);
    const shares = (counts) => counts.map((value) => value / Math.max(total(counts), 1));
    const positives = total(positive) / Math.max(total(positive) + total(negative), 1);
    const never = point.threshold === null || point.threshold === undefined;
    const logOdds = never ? 0 : Math.log(point.threshold / (1 - point.threshold));
    const edges = curves.edges;
    const inside = Math.min(Math.max(logOdds, edges[0]), edges[edges.length - 1]);
    return {
      precision_recall_source: curve.precision_recall,
      fitted_precision_recall_source: curve.fitted_precision_recall,
      prevalence_source: { x: [0, 1], y: [positives, positives] },
      operating_point_source: { recall: [point.recall], precision: [point.precision] },
      before_source: curve.reliability.before,
      after_source: curve.reliability.after,
      histogram_source: {
        left: edges.slice(0, -1),
        right: edges.slice(1),
        positive: shares(positive),
        negative: shares(negative),
      },
      threshold_source: { x: never ? [] : [inside] },
    };
  }

  function model(name) {
    for (const page of Bokeh.documents) {
      const found = page.get_model_by_name(name);
      if (found !== null) return found;
    }
    throw new Error(`no ${name}`);
  }

  function choose(label) {
    const place = label === "" ? -1 : curves.labels.indexOf(Number(label));
    const curve = place < 0 ? curves.every : curves.each[place];
    const point = place < 0 ? curves.every_point : curves.each_point[place];
    for (const [name, columns] of Object.entries(sourcesOf(curve, point))) {
      model(name).data = columns;
    }
    // The bins of a rare label lie in a corner: the axes end a little beyond them.
    const { before, after } = curve.reliability;
    const ends = [...before.probability, ...after.probability, ...after.high, ...before.share];
    model("reliability_range").end = Math.min(1, 1.08 * Math.max(0.01, ...ends));
    find("chosen").value = place < 0 ? "" : label;
  }

  const byValue = new Intl.Collator(undefined, { numeric: true }).compare;

  // A cell's number or text; undefined for a number that is missing, which comes last either way.
  function valueOf(row, column) {
    const cell = row.cells[column];
    if (column === 0) return cell.textContent.trim();
    return cell.dataset.value === undefined ? undefined : Number(cell.dataset.value);
  }

  function sort(table, column) {
    const heads = [...table.tHead.rows[0].cells];
    const first = column === 0 ? "ascending" : "descending";
    const other = column === 0 ? "descending" : "ascending";
    const order = heads[column].getAttribute("aria-sort") === first ? other : first;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return sign * (column === 0 ? byValue(a, b) : a - b);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, column));
    });
  }

  function filter() {
    const wanted = find("filter").value.trim().toLowerCase();
    const rows = [...find("label-table").tBodies[0].rows];
    for (const row of rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    }
    const shown = rows.filter((row) => !row.hidden).length;
    find("shown").textContent = `${shown} of ${rows.length} labels`;
  }

  find("filter").addEventListener("input", filter);
  filter();
  find("chosen").addEventListener("change", (event) => choose(event.target.value));
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-label]");
    if (link !== null) choose(link.dataset.label);
  });

  Promise.all(plots.map((item) => Bokeh.embed.embed_item(item))).then(() => {
    choose("");
    document.documentElement.dataset.ready = "true";
  });
})();
