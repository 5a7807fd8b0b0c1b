package treecopy

import (
	"io"

	"golang.org/x/sys/unix"
)

// piece is how much is copied at once, in bytes: after each the caller may end it.
const piece = 8 << 20

// maxUnsized bounds what is read of a file that says to be empty, as those of /proc do.
const maxUnsized = 64 << 20

// dataEngine remembers which of the kernel's ways to copy work between the two file systems.
type dataEngine struct {
	noClone, noRange, noSendfile bool
	buf                          []byte
}

func (e *dataEngine) close() { e.buf = nil }

// fill copies a file's content: as a clone where the file system shares blocks, else what is no hole, inside the kernel where it can. A
// file that grows meanwhile is as long as it was; one that shrinks ends earlier.
func (c *copier) fill(src, dst int, st *unix.Stat_t) error {
	if st.Size == 0 {
		return c.unsized(src, dst)
	}
	before := c.size
	defer func() { // as a tar has it, holes and all
		c.size = before
		c.content((st.Size + tarBlock - 1) / tarBlock * tarBlock)
	}()
	if !c.engine.noClone {
		if unix.IoctlFileClone(dst, src) == nil {
			return nil
		}
		c.engine.noClone = true // other file systems, or one that can't
	}
	if st.Blocks*512 >= st.Size {
		_, err := c.run(src, dst, 0, st.Size)
		return err
	}
	for off := int64(0); off < st.Size; {
		data, err := unix.Seek(src, off, unix.SEEK_DATA)
		if err == unix.ENXIO || err == nil && data >= st.Size {
			break // a hole to the end
		}
		end := st.Size
		if err != nil { // no holes on this file system
			data = off
		} else if end, err = unix.Seek(src, data, unix.SEEK_HOLE); err != nil || end > st.Size {
			end = st.Size
		}
		n, err := c.run(src, dst, data, end)
		if err != nil {
			return err
		}
		if n < end-data { // cut off meanwhile
			break
		}
		off = end
	}
	return unix.Ftruncate(dst, st.Size)
}

// run copies the bytes from off to end, or to the file's end, and returns how many.
func (c *copier) run(src, dst int, off, end int64) (int64, error) {
	start := off
	for off < end {
		if err := c.ctx.Err(); err != nil {
			return off - start, err
		}
		n, err := c.engine.copy(src, dst, off, int(min(end-off, piece)))
		if err != nil {
			return off - start, err
		}
		if n == 0 {
			break
		}
		off += int64(n)
		c.content(int64(n))
	}
	return off - start, nil
}

// copy copies up to n bytes at off; 0 at the end.
func (e *dataEngine) copy(src, dst int, off int64, n int) (int, error) {
	if !e.noRange {
		a, b := off, off
		k, err := unix.CopyFileRange(src, &a, dst, &b, n, 0)
		if err == nil && (k > 0 || off > 0) {
			return k, nil
		}
		// It copies nothing from files that have no size of their own.
		e.noRange = err != nil
	}
	if !e.noSendfile {
		if _, err := unix.Seek(dst, off, io.SeekStart); err != nil {
			return 0, err
		}
		a := off
		k, err := unix.Sendfile(dst, src, &a, n)
		if err == nil {
			return k, nil
		}
		if err != unix.EINVAL && err != unix.ENOSYS && err != unix.EAGAIN {
			return 0, err
		}
		e.noSendfile = true
	}
	if e.buf == nil {
		e.buf = make([]byte, 256<<10)
	}
	k, err := pread(src, e.buf[:min(n, len(e.buf))], off)
	if err != nil {
		return 0, err
	}
	for done := 0; done < k; {
		w, err := unix.Pwrite(dst, e.buf[done:k], off+int64(done))
		if err != nil {
			return 0, err
		}
		done += w
	}
	return k, nil
}

func pread(fd int, p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(fd, p, off)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// unsized copies a file that says to be empty: what can be read of it without waiting, up to a bound.
func (c *copier) unsized(src, dst int) error {
	buf := make([]byte, 64<<10)
	total := int64(0)
	for total < maxUnsized {
		n, err := unix.Read(src, buf)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN || n == 0 && err == nil {
			break
		}
		if err != nil {
			return err
		}
		for done := 0; done < n; {
			w, err := unix.Write(dst, buf[done:n])
			if err != nil {
				return err
			}
			done += w
		}
		total += int64(n)
		if err := c.ctx.Err(); err != nil {
			return err
		}
	}
	c.content((total + tarBlock - 1) / tarBlock * tarBlock)
	return nil
}
