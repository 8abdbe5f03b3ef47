// ---------------------------------------------------------------- few rows by the matrix unit
//
// Of few rows and columns that lie along k the turned product is made: the blocks of the unit are columns as they lie in
// memory, and the rows are what is packed, a few panels at a time. To pack columns takes longer than to multiply
// them with few rows, and still an eighth of the time of 256 rows (Granite Rapids).

INLINE bool swaps(i64 m, i64 n) { return m <= SWAPPED && n >= 3 * m; }

// What a swapped product asks for early: of its left operand the block after the next, each panel of `columns` a part.
template <class T>
struct Streamed {
  i64 step, k, columns;
  INLINE Ahead ahead(i64, i64, i64 wide, i64 t, const Ahead& next) const {
    constexpr i64 ROWS = Unit<T>::ROWS;
    const i64 panels = wide / WIDTH, x = t % panels, row = step * (i64)sizeof(T), lines = k * (i64)sizeof(T) / 64;
    const i64 times = (columns <= WIDTH / 2 ? 4 : 2) / panels;
    return {next.at + (ROWS + x * ROWS / panels) * row, 64, row - lines * 64, lines, times};
  }
};

// Turns the sums of blocks of a swapped product, whose last row is `last`: finish(batch, row, first column, end, sums).
template <class T, class Finish>
struct Turned {
  i64 last;
  Finish finish;
  INLINE int operator()(i64 b, i64 column, i64 begin, i64 end, const float* sums) const {
    constexpr i64 ROWS = Unit<T>::ROWS;
    const i64 i = column % ROWS;
    if (i + 1 < ROWS && column < last) return 0;
    alignas(64) float rows[WIDTH * ROWS];
    turn_words((const u16*)(sums - i * WIDTH), 2 * WIDTH, i + 1, end - begin, 0, ROWS, ROWS, (u32*)rows);
    int bad = 0;
    for (i64 r = begin; r < end; ++r) bad |= finish(b, r, column - i, column + 1, rows + (r - begin) * ROWS);
    return bad;
  }
};

// Columns n0 .. n0 + columns of w for some rows of x: panel() with its operands swapped.
template <class T, class Finish>
INLINE int swapped_panel(const Rows<T>& w, i64 b, i64 n0, i64 columns, const Rows<T>& x, i64 r0, i64 rows, i64 k, i64 part,
                         float* sums, T* to, Finish finish) {
  const auto pack = [=](i64, i64 row, i64 count, i64 k0, i64 ks, T* to, char*) __attribute__((always_inline)) -> int {
    pack_panel<true>(x.at + row * x.step + k0, x.step, ks, count, to);
    return 0;
  };
  const Turned<T, Finish> turned = {n0 + columns - 1, finish};
  constexpr i64 SPAN = TOGETHER * WIDTH;
  int bad = 0;
  for (i64 r = 0; r < rows; r += SPAN) {
    const i64 count = min(SPAN, rows - r);
    const Streamed<T> from = {w.step, part, count};
    if (count <= WIDTH) bad |= panel<T, UnitOnce<T>>(w, b, n0, columns, r0 + r, count, k, part, sums, to, nullptr, from, from, r0, pack, turned);
    else bad |= panel<T>(w, b, n0, columns, r0 + r, count, k, part, sums, to, nullptr, from, from, r0, pack, turned);
  }
  return bad;
}

// As tiled; right(batch) -> Rows<T>, its rows are the columns.
template <class T, class Left, class Right_, class Finish, class Soon = Nothing>
INLINE int swapped(i64 batch, i64 m, i64 n, i64 k, i64 threads, Left left, Right_ right, Finish finish, Soon soon = {}) {
  const auto from = [=](i64 b) __attribute__((always_inline)) -> Streamed<T> { return {right(b).step, part_of<T>(k), m}; };
  const auto pack = [=](i64 b, i64 row, i64 rows, i64 k0, i64 ks, T* to, char*) __attribute__((always_inline)) -> int {
    const Rows<T> a = left(b);
    pack_panel<true>(a.at + row * a.step + k0, a.step, ks, rows, to);
    return 0;
  };
  const auto early = [=](i64 b, i64 column, i64 begin, i64 end) __attribute__((always_inline)) {
    if (column % Unit<T>::ROWS == 0)
      for (i64 r = begin; r < end; ++r) soon(b, r, column, min(n, column + Unit<T>::ROWS));
  };
  const Turned<T, Finish> turned = {n - 1, finish};
  if (m <= WIDTH) return tiled<T, 0, UnitOnce<T>>(batch, n, m, k, threads, right, from, pack, turned, early);
  return tiled<T, 0>(batch, n, m, k, threads, right, from, pack, turned, early);
}
