"use strict";
// A chart says in words the point that the pointer or the arrow keys have reached.
for (const figure of document.querySelectorAll("figure")) {
  const points = [...figure.querySelectorAll('svg [role="graphics-symbol"][aria-label]')];
  const output = figure.querySelector("output");
  let here = -1;
  const show = (index) => {
    if (here >= 0) points[here].classList.remove("here");
    here = index;
    if (here >= 0) points[here].classList.add("here");
    output.textContent = here < 0 ? "\u00a0" : points[here].getAttribute("aria-label");
  };
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
  figure.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return show(-1);
    if (!(event.key in steps) || !points.length) return;
    event.preventDefault();
    show(Math.min(points.length - 1, Math.max(0, here + steps[event.key])));
  });
  figure.addEventListener("blur", () => show(-1));
  figure.addEventListener("pointerleave", () => show(-1));
  figure.addEventListener("pointermove", (event) => {
    let nearest = -1;
    let least = 40; // pixels: further away no point is meant
    points.forEach((point, index) => {
      const box = point.getBoundingClientRect();
      const x = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
      const y = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
      const distance = Math.hypot(x * 3, y / 2);
      if (distance < least) [least, nearest] = [distance, index];
    });
    show(nearest);
  });
}
