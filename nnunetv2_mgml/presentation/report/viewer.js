"use strict";
// The slice viewer. All data is in #viewer-data; see sprites.py for what it holds.
(function () {
  const SCALE = 2; // canvas pixels per image pixel, so that outlines are finer than pixels
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const element = (name) => document.getElementById("viewer-" + name);
  const state = {case: 0, subset: data.subsets.length - 1, modality: data.modalities[data.modalities.length - 1], slice: 0};
  const decoded = new Map(); // data URI -> promise of an image; the browser decodes each picture once
  const masks = new Map(); // data URI -> promise of label ranks of the whole sprite
  let drawing = 0;

  const colours = data.labels.map((label) => [1, 3, 5].map((i) => parseInt(label.colour.slice(i, i + 2), 16)));

  function picture(uri) {
    if (!decoded.has(uri)) {
      const image = new Image();
      image.src = uri;
      decoded.set(uri, image.decode().then(() => image));
    }
    return decoded.get(uri);
  }

  function mask(uri) {
    if (!masks.has(uri)) {
      masks.set(uri, picture(uri).then((image) => {
        const context = canvas(image.width, image.height).getContext("2d", {willReadFrequently: true});
        context.drawImage(image, 0, 0);
        const pixels = context.getImageData(0, 0, image.width, image.height).data;
        const ranks = new Uint8Array(image.width * image.height);
        for (let i = 0; i < ranks.length; i++) {
          ranks[i] = Math.round(pixels[4 * i] / data.greyStep);
        }
        return {ranks, width: image.width};
      }));
    }
    return masks.get(uri);
  }

  function canvas(width, height) {
    const result = document.createElement("canvas");
    result.width = width;
    result.height = height;
    return result;
  }

  function tile(current) {
    return {x: (state.slice % current.columns) * current.tileWidth,
            y: Math.floor(state.slice / current.columns) * current.tileHeight};
  }

  function cut(labels, current) {
    const origin = tile(current);
    const result = new Uint8Array(current.width * current.height);
    for (let y = 0; y < current.height; y++) {
      const start = (origin.y + y) * labels.width + origin.x;
      result.set(labels.ranks.subarray(start, start + current.width), y * current.width);
    }
    return result;
  }

  function drawImage(target, image, current) {
    target.width = current.width * SCALE;
    target.height = current.height * SCALE;
    target.style.aspectRatio = current.width + " / " + current.height * current.aspect;
    const context = target.getContext("2d");
    if (image) {
      const origin = tile(current);
      context.imageSmoothingQuality = "high";
      context.drawImage(image, origin.x, origin.y, current.width, current.height, 0, 0, target.width, target.height);
    }
    return context;
  }

  function drawLabels(context, labels, current) {
    const small = canvas(current.width, current.height);
    const overlay = small.getContext("2d");
    const pixels = overlay.createImageData(current.width, current.height);
    labels.forEach((rank, i) => {
      if (rank > 0 && rank <= colours.length) {
        pixels.data.set([...colours[rank - 1], 255], 4 * i);
      }
    });
    overlay.putImageData(pixels, 0, 0);
    context.save();
    context.globalAlpha = element("opacity").value / 100;
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
    context.restore();
  }

  // Draw the border lines between pixels of different labels.
  function drawOutline(context, labels, current, style, width) {
    const w = current.width;
    const h = current.height;
    const at = (x, y) => (x < 0 || y < 0 || x >= w || y >= h ? 0 : labels[y * w + x]);
    context.save();
    context.lineWidth = width;
    const paths = new Map();
    const line = (colour, x1, y1, x2, y2) => {
      if (!paths.has(colour)) {
        paths.set(colour, new Path2D());
      }
      paths.get(colour).moveTo(x1 * SCALE, y1 * SCALE);
      paths.get(colour).lineTo(x2 * SCALE, y2 * SCALE);
    };
    for (let y = 0; y <= h; y++) {
      for (let x = 0; x <= w; x++) {
        const here = at(x, y);
        const left = at(x - 1, y);
        const above = at(x, y - 1);
        if (here !== left) {
          line(style(Math.max(here, left)), x, y, x, y + 1);
        }
        if (here !== above) {
          line(style(Math.max(here, above)), x, y, x + 1, y);
        }
      }
    }
    for (const [colour, path] of paths) {
      context.strokeStyle = colour;
      context.stroke(path);
    }
    context.restore();
  }

  function drawSides(context, sides) {
    if (!sides) {
      return; // the files do not say which side is which
    }
    context.fillStyle = "white";
    context.font = "bold " + Math.round(context.canvas.width / 22) + "px sans-serif";
    context.textBaseline = "top";
    context.fillText(sides[0], 6, 6);
    context.textAlign = "right";
    context.fillText(sides[1], context.canvas.width - 6, 6);
    context.textAlign = "left";
  }

  const own = (rank) => (rank > 0 && rank <= colours.length ? data.labels[rank - 1].colour : "white");

  async function draw() {
    const mine = ++drawing;
    const current = data.cases[state.case];
    const subset = data.subsets[state.subset];
    const uri = current.images[state.modality];
    const answer = current.predictions[subset.name];
    const [image, reference, prediction] = await Promise.all([
      uri ? picture(uri) : null, mask(current.reference), answer ? mask(answer) : null]);
    if (mine !== drawing) {
      return; // the user has moved on
    }
    const truth = cut(reference, current);
    const predicted = prediction ? cut(prediction, current) : new Uint8Array(truth.length);
    drawSides(drawImage(element("image"), image, current), current.sides);
    const left = drawImage(element("reference"), image, current);
    drawLabels(left, truth, current);
    drawOutline(left, truth, current, own, 1.4);
    drawSides(left, current.sides);
    const right = drawImage(element("prediction"), image, current);
    drawLabels(right, predicted, current);
    drawOutline(right, predicted, current, own, 1.4);
    if (element("outline").checked) {
      drawOutline(right, truth, current, () => "white", 1.3);
    }
    drawSides(right, current.sides);
    describe(current, subset, Boolean(uri), Boolean(answer));
  }

  function describe(current, subset, hasImage, hasPrediction) {
    const name = data.titles[state.modality];
    element("image-text").textContent = hasImage ? name : name + " is missing in this case";
    element("prediction-text").textContent =
      (hasPrediction ? "Prediction from " : "This case was not predicted from ") + subset.title;
    element("slice-text").textContent = (current.slices[state.slice] + 1) + " of " + current.depth;
    element("image").setAttribute("aria-label", name + ", slice " + (current.slices[state.slice] + 1));
    element("prediction").setAttribute("aria-label", "Prediction from " + subset.title);
    for (const row of element("scores").tBodies[0].rows) {
      row.classList.toggle("current", Number(row.dataset.subset) === state.subset);
    }
    element("app").dataset.shown = [current.name, subset.name, state.modality, current.slices[state.slice]].join("|");
  }

  function option(select, text, value) {
    const entry = document.createElement("option");
    entry.textContent = text;
    entry.value = value;
    select.append(entry);
  }

  function row(section, texts, kind) {
    const line = section.insertRow();
    for (const text of texts) {
      const cell = document.createElement(kind);
      cell.textContent = text;
      line.append(cell);
    }
    return line;
  }

  function enterCase(index) {
    const current = data.cases[index];
    state.case = index;
    state.slice = current.best;
    element("slice").max = current.slices.length - 1;
    element("slice").value = state.slice;
    const table = element("scores");
    table.tHead.replaceChildren();
    table.tBodies[0].replaceChildren();
    row(table.tHead, ["available modalities", ...data.regions.map((region) => data.regionTitles[region])], "th");
    data.subsets.forEach((subset, number) => {
      const scores = current.scores[subset.name];
      const line = row(table.tBodies[0], [subset.title, ...data.regions.map((region) => scores[region])], "td");
      line.dataset.subset = number;
      line.addEventListener("click", () => enterSubset(number));
    });
    draw();
  }

  function enterSubset(index) {
    state.subset = (index + data.subsets.length) % data.subsets.length;
    element("subset").value = state.subset;
    draw();
  }

  function enterSlice(index) {
    state.slice = Math.min(Math.max(index, 0), data.cases[state.case].slices.length - 1);
    element("slice").value = state.slice;
    draw();
  }

  function build() {
    data.cases.forEach((entry, i) => option(element("case"), entry.name, i));
    data.subsets.forEach((subset, i) => option(element("subset"), subset.title, i));
    element("subset").value = state.subset;
    for (const name of data.modalities) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      input.type = "radio";
      input.name = "modality";
      input.value = name;
      input.checked = name === state.modality;
      input.addEventListener("change", () => {
        state.modality = name;
        draw();
      });
      label.append(input, " " + data.titles[name]);
      element("modality").append(label);
    }
    for (const entry of [...data.labels, {name: "outline of the ground truth", colour: null}]) {
      const item = document.createElement("li");
      const swatch = document.createElement("i");
      if (entry.colour) {
        swatch.style.background = entry.colour;
      } else {
        swatch.className = "outline";
      }
      item.append(swatch, entry.name);
      element("legend").append(item);
    }
  }

  function listen() {
    element("controls").addEventListener("submit", (event) => event.preventDefault());
    element("case").addEventListener("change", (event) => enterCase(Number(event.target.value)));
    element("subset").addEventListener("change", (event) => enterSubset(Number(event.target.value)));
    element("slice").addEventListener("input", (event) => enterSlice(Number(event.target.value)));
    element("opacity").addEventListener("input", draw);
    element("outline").addEventListener("change", draw);
    const panels = element("panels");
    panels.addEventListener("click", () => panels.focus());
    panels.addEventListener("keydown", (event) => {
      const moves = {ArrowUp: () => enterSlice(state.slice + 1), ArrowDown: () => enterSlice(state.slice - 1),
                     ArrowLeft: () => enterSubset(state.subset - 1), ArrowRight: () => enterSubset(state.subset + 1)};
      if (moves[event.key] && !event.ctrlKey && !event.altKey && !event.metaKey) {
        event.preventDefault();
        moves[event.key]();
      }
    });
    panels.addEventListener("wheel", (event) => {
      if (document.activeElement === panels && event.deltaY !== 0) {
        event.preventDefault();
        enterSlice(state.slice + (event.deltaY < 0 ? 1 : -1));
      }
    }, {passive: false});
  }

  build();
  listen();
  element("app").hidden = false;
  enterCase(0);
})();
