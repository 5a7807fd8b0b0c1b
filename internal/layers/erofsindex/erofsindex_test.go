package erofsindex

import (
	"archive/tar"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/layertar"
)

// scan makes a tree and the tar that it speaks of.
func scan(t *testing.T, headers ...tar.Header) (*layertar.Tree, []byte) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(bytes.Repeat([]byte("x"), int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	tree, err := layertar.Scan(bytes.NewReader(b.Bytes()), nil)
	if err != nil {
		t.Fatal(err)
	}
	return tree, b.Bytes()
}

// Two names, with and without a tail, that force folders and links into every layout.
func layouts(t *testing.T) (*layertar.Tree, []byte) {
	var h []tar.Header
	for _, d := range []string{"empty/", "small/", "large/"} {
		h = append(h, tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755})
	}
	for n := range 40 {
		h = append(h, tar.Header{Typeflag: tar.TypeReg, Name: "large/" + strings.Repeat("n", n*6+1), Size: int64(n * 100), Mode: 0o644})
		h = append(h, tar.Header{Typeflag: tar.TypeSymlink, Name: "small/l" + strings.Repeat("i", n), Linkname: strings.Repeat("t", n*17+1)})
	}
	return scan(t, h...)
}

// The tool of the format's authors finds nothing to complain about.
func TestFsck(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("fsck.erofs is not installed")
	}
	tree, data := layouts(t)
	dir := t.TempDir()
	var index bytes.Buffer
	if err := Write(&index, tree, int64(len(data)), 0); err != nil {
		t.Fatal(err)
	}
	img, dev := filepath.Join(dir, "index.erofs"), filepath.Join(dir, "layer.tar")
	if err := os.WriteFile(img, index.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dev, data, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(fsck, "--device="+dev, img).CombinedOutput()
	if err != nil && (strings.Contains(string(out), "block size 512") || strings.Contains(string(out), "blksize") || strings.Contains(string(out), "blkszbits")) {
		t.Skipf("this fsck.erofs knows no blocks of 512 bytes (1.6 does): %s", strings.TrimSpace(string(out)))
	}
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// What the kernel takes for granted: no inode, no tail of a folder or link crosses a block, and the image is whole pages.
func TestPlacement(t *testing.T) {
	tree, data := layouts(t)
	b := &builder{byInode: map[*layertar.Inode]int32{}, pos: slotOffset + slotSize}
	b.place(tree.Root(), nil)
	b.placeBlocks()
	kinds := map[string]int{}
	last := int64(0)
	for _, n := range b.nodes {
		if n.pos < last || n.pos%32 != 0 || n.pos%BlockSize > BlockSize-inodeSize {
			t.Errorf("inode at %d after %d", n.pos, last)
		}
		end := n.pos + inodeSize + int64(n.xattrs)
		if n.layout == layoutInline {
			tail := n.dsize % BlockSize
			if end/BlockSize != (end+tail-1)/BlockSize {
				t.Errorf("tail of %d bytes at %d", tail, end)
			}
			end += tail
		}
		last = end
		if n.ino.IsDir() {
			kinds["dir"]++
		}
		if n.dsize > 0 && n.layout == layoutPlain {
			kinds["plain"]++
		}
		if n.layout == layoutInline && n.dsize > BlockSize {
			kinds["blocks and tail"]++
		}
	}
	for _, k := range []string{"dir", "plain", "blocks and tail"} {
		if kinds[k] == 0 {
			t.Errorf("the test's tree has none of: %s", k)
		}
	}
	var out bytes.Buffer
	if err := Write(&out, tree, int64(len(data)), 0); err != nil || out.Len()%4096 != 0 || int64(out.Len()) != b.size {
		t.Errorf("image of %d bytes, %v", out.Len(), err)
	}
}
