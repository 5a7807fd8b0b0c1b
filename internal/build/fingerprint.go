package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"math"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// fingerprint hashes what a selection means for the layer that COPY makes of it: names, types, modes, link targets, extended
// attributes and contents, and owners where they are kept. Times are left out, since an edit without a change of content shall not
// count.
func (v *view) fingerprint(ctx context.Context, sel []source) (string, error) {
	sums, err := v.contentSums(ctx, sel)
	if err != nil {
		return "", err
	}
	sum, ok := v.sumUp(sel, sums)
	if ok {
		v.lists.keep(sum, sel, sums)
	}
	return sum, nil
}

// sumUp is the fingerprint of a selection whose regular files have these hashes, in its order; ok is false when they are not as many.
func (v *view) sumUp(sel []source, sums [][sha256.Size]byte) (sum string, ok bool) {
	h := sha256.New()
	n := 0
	buf := make([]byte, 0, 4<<10)
	for i := range sel {
		s := &sel[i]
		buf = strconv.AppendQuote(append(buf, "source "...), s.name)
		buf = append(strconv.AppendBool(append(buf, ' '), s.dir), '\n')
		for k := range s.items {
			it := &s.items[k]
			if it.rel == "" && s.dir {
				continue // its own attributes are not copied
			}
			if len(buf) > 3<<10 {
				h.Write(buf)
				buf = buf[:0]
			}
			buf = it.describe(buf, v.owners)
			if it.kind() == unix.S_IFREG {
				if n == len(sums) {
					return "", false
				}
				buf = append(buf, sums[n][:]...)
				n++
			}
			buf = append(buf, '\n')
		}
	}
	h.Write(buf)
	return hex.EncodeToString(h.Sum(nil)), n == len(sums)
}

// describe appends what counts of an item besides its content.
func (i *item) describe(b []byte, owners bool) []byte {
	b = append(strconv.AppendQuote(b, i.rel), ' ')
	b = append(strconv.AppendUint(b, uint64(i.st.Mode), 8), ' ')
	b = append(strconv.AppendQuote(b, i.link), " ["...)
	for k, x := range i.xattrs {
		if k > 0 {
			b = append(b, ' ')
		}
		b = strconv.AppendQuote(b, x)
	}
	number := func(n uint32, end byte) { b = append(strconv.AppendUint(b, uint64(n), 10), end) }
	b = append(b, "] "...)
	number(unix.Major(i.st.Rdev), ':')
	number(unix.Minor(i.st.Rdev), ' ')
	if owners {
		number(i.st.Uid, ':')
		number(i.st.Gid, ' ')
	}
	return b
}

// contentSums hashes the regular files of a selection, in its order, those that the cache does not know in parallel.
func (v *view) contentSums(ctx context.Context, sel []source) ([][sha256.Size]byte, error) {
	n := 0
	for i := range sel {
		for k := range sel[i].items {
			if sel[i].items[k].kind() == unix.S_IFREG {
				n++
			}
		}
	}
	files := make([]*item, 0, n)
	for i := range sel {
		for k := range sel[i].items {
			if it := &sel[i].items[k]; it.kind() == unix.S_IFREG {
				files = append(files, it)
			}
		}
	}
	sums := make([][sha256.Size]byte, len(files))
	var todo []int
	if v.stats != nil {
		todo = v.stats.gets(files, sums)
	} else {
		todo = make([]int, len(files))
		for i := range todo {
			todo[i] = i
		}
	}
	if len(todo) == 0 {
		return sums, nil
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(runtime.GOMAXPROCS(0), len(todo)) {
		g.Go(func() error {
			h := newContentHash()
			for {
				k := int(next.Add(1)) - 1
				if k >= len(todo) {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				it := files[todo[k]]
				now, before := time.Now(), statID(&it.st)
				sum, short, err := v.hashFile(ctx, it, h)
				if err != nil {
					return err
				}
				sums[todo[k]] = sum
				if v.stats != nil && !short {
					v.stats.put(it.path, &it.st, sum, len(it.xattrs) == 0 && before == statID(&it.st), now)
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return sums, nil
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// copyBuffered is io.Copy with a buffer that is used again. Neither side may take the copy over: it would allocate for each small file.
func copyBuffered(w io.Writer, r io.Reader) (int64, error) { return copyUpTo(w, r, math.MaxInt64) }

// copyUpTo is copyBuffered for so many bytes at most; it does not ask for what is behind them.
func copyUpTo(w io.Writer, r io.Reader, limit int64) (n int64, err error) {
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	for n < limit {
		k, err := r.Read((*b)[:min(int64(len(*b)), limit-n)])
		if _, werr := w.Write((*b)[:k]); werr != nil {
			return n, werr
		}
		n += int64(k)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
