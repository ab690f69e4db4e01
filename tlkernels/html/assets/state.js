"use strict";
// What the reader chose, kept in the URL's fragment: a link shows the same view.

{
  let values = new URLSearchParams();
  const read = () => {
    values = new URLSearchParams(location.hash.slice(1));
  };
  const write = () => {
    history.replaceState(null, "", `#${values}`);
    report.render();
  };

  report.state = {
    get: (key) => values.get(key),
    list: (key) => values.getAll(key),
    set: (key, value) => {
      values.set(key, value);
      write();
    },
    setAll: (changes) => {
      for (const [key, value] of Object.entries(changes)) {
        values.delete(key);
        for (const one of [value].flat()) values.append(key, one);
      }
      write();
    },
  };

  read();
  addEventListener("hashchange", () => {
    read();
    report.render();
  });
}
