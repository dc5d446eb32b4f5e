// Keeps the page live: asks for it again, and changes what is not the same in place, so that focus, scrolling and what
// is unfolded stay. Says so when the worker does not answer.
"use strict";

const EVERY_MS = 2000;
const PATIENCE_MS = 8000;
const page = document.getElementById("page");
const silence = document.getElementById("silence");

/** Make an element the same as another one; what a person unfolds stays unfolded. */
function become(now, next) {
  for (const { name } of [...now.attributes]) {
    if (!next.hasAttribute(name) && name !== "open") now.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (name !== "open" && now.getAttribute(name) !== value) now.setAttribute(name, value);
  }
  const wanted = [...next.childNodes];
  wanted.forEach((child, number) => {
    const old = now.childNodes[number];
    if (old === undefined) now.append(child);
    else if (old.nodeType !== child.nodeType || old.nodeName !== child.nodeName || old.id !== child.id) old.replaceWith(child);
    else if (child.nodeType === Node.ELEMENT_NODE) become(old, child);
    else if (old.data !== child.data) old.data = child.data;
  });
  while (now.childNodes.length > wanted.length) now.lastChild.remove();
}

/** Said once, when it begins: who hears the page is told, and not every two seconds. */
function fallSilent(why) {
  if (document.body.classList.contains("is-old")) return;
  const since = page.dataset.time.slice(0, 19).replace("T", " ");
  document.body.classList.add("is-old");
  document.title = `No answer: ${document.title.replace(/^[^:]*: /, "")}`;
  silence.textContent = `This worker has not answered since ${since} UTC (${why}). All below is old, of then.`;
}

async function ask() {
  try {
    const answer = await fetch(location.pathname, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    const content = next.getElementById("page");
    if (content === null) throw new Error("another server is there now");
    document.body.classList.remove("is-old");
    silence.textContent = "";
    if (document.title !== next.title) document.title = next.title;
    become(page, content);
  } catch (error) {
    fallSilent(error.name === "TimeoutError" ? "it takes too long" : error.name === "TypeError" ? "no connection" : error.message);
  }
  setTimeout(ask, EVERY_MS);
}

setTimeout(ask, EVERY_MS);
