// What a node of this pack says when it has run stays on it: ComfyUI's own front end draws a node's
// `ui.text` on Preview as Text alone. The text is kept in the node's properties, so that it is there again
// when the workflow is opened; widgets would shift the order of the values that are saved.
import { app } from "../../../scripts/app.js"

const NAME = "visual_concepts_text"
const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/extensions/")[1].split("/")[0])
const LINE = 17
const LEAST = 2
const MOST = 9

function textElement() {
  const element = document.createElement("div")
  Object.assign(element.style, {
    boxSizing: "border-box",
    color: "var(--input-text, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    borderRadius: "4px",
    padding: "4px 8px",
    font: `12px/${LINE}px sans-serif`,
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    overflowY: "auto",
    userSelect: "text"
  })
  element.dataset.testid = NAME
  return element
}

function addText(node) {
  const element = textElement()
  const height = () => {
    const lines = Math.ceil(element.textContent.length / 48) + element.textContent.split("\n").length
    return Math.min(MOST, Math.max(LEAST, lines)) * LINE + 8
  }
  const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height }
  const widget = node.addDOMWidget(NAME, NAME, element, options)
  widget.serialize = false
  return widget
}

function hide(node) {
  const widget = node.widgets?.find((each) => each.name === NAME)
  delete node.properties[NAME]
  if (!widget) return
  if (node.removeWidget) node.removeWidget(widget)
  else {
    widget.onRemove?.()
    node.widgets.splice(node.widgets.indexOf(widget), 1)
  }
}

function show(node, text) {
  const widget = node.widgets?.find((each) => each.name === NAME) ?? addText(node)
  widget.element.textContent = text
  node.properties[NAME] = text
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)])
  node.graph?.setDirtyCanvas(true, true)
}

app.registerExtension({
  name: "VisualConcepts.TextOnNodes",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.python_module !== `custom_nodes.${FOLDER}`) return
    const { onExecuted, onConfigure } = nodeType.prototype
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments)
      if (!output?.text) return
      const text = [output.text].flat().join("\n").trim()
      if (text) show(this, text)
      else hide(this)
    }
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments)
      if (this.properties?.[NAME]) show(this, this.properties[NAME])
    }
  }
})
