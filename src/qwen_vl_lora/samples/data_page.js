(() => {
  const save = document.getElementById("save");
  const boxes = Array.from(document.querySelectorAll("input[data-row]"));
  const count = () => {
    const ticked = boxes.filter((box) => box.checked).length;
    save.disabled = ticked === 0;
    save.textContent = (ticked === 1 ? save.dataset.one : save.dataset.many).replace("{count}", ticked);
  };
  for (const box of boxes) {
    box.disabled = false;
    box.addEventListener("change", count);
  }
  document.getElementById("tick").addEventListener("click", () => {
    const shown = boxes.filter((box) => !box.closest("[hidden]"));
    const all = shown.every((box) => box.checked);
    shown.forEach((box) => (box.checked = !all));
    count();
  });
  save.addEventListener("click", () => {
    const lines = ["row,image_id,source", ...boxes.filter((box) => box.checked).map((box) => box.dataset.row)];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "exclude.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  count();
})();
