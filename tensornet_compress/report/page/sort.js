// A click on the head of a column sorts its table; the exact number of a cell is its title.
for (const table of document.querySelectorAll('.scroll table')) {
  const [heads, body] = [[...table.tHead.rows[0].cells], table.tBodies[0]];
  if (body.rows.length < 3) continue;
  heads.forEach((head, place) => {
    const button = document.createElement('button');
    button.append(...head.childNodes);
    head.append(button);
    const number = row => {
      const cell = row.cells[place];
      const text = (cell.title || cell.firstChild?.textContent || '').replace(/,/g, '');
      return cell.classList.contains('n') ? parseFloat(text) : NaN;
    };
    const words = row => row.cells[place].textContent;
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const sign = down ? -1 : 1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [number(a), number(b)];
        if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? sign * words(a).localeCompare(words(b)) : isNaN(x) - isNaN(y);
        return sign * (x - y);
      });
      body.append(...rows);
    });
  });
}
