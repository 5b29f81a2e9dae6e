// A picture that is pasted anywhere, or dropped where one is shown already, goes the way of one that is chosen.
function take(event, files) {
  const picture = [...(files ?? [])].find(file => file.type.startsWith("image/"));
  const input = document.querySelector("#picture input[type=file]");
  if (!picture || !input) return;
  event.preventDefault();
  const chosen = new DataTransfer();
  chosen.items.add(picture);
  input.files = chosen.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
}
document.addEventListener("paste", event => take(event, event.clipboardData?.files));
document.addEventListener("dragover", event => event.target.closest?.("#picture") && event.preventDefault());
document.addEventListener("drop", event => event.target.closest?.("#picture") && take(event, event.dataTransfer?.files));
// Gradio labels its upload button with other words than those that stand on it.
new MutationObserver(() => {
  for (const button of document.querySelectorAll("#picture button[aria-label]"))
    if (button.innerText.trim()) button.removeAttribute("aria-label");
}).observe(document.body, {childList: true, subtree: true});
