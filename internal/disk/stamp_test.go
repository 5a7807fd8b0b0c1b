package disk

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestStamp: no change is overlooked, however soon after the last one; a file at rest is not read twice for ever.
func TestStamp(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stamp := func() Stamp {
		t.Helper()
		s, err := StampOf(file)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	write("aa")
	for k := range 500 {
		s := stamp()
		write([]string{"aa", "bb"}[k%2])
		if s.Still(stamp()) {
			t.Fatalf("change %d of the same size was not seen", k)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		s := stamp()
		if s.Still(stamp()) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a file that nobody writes to never settles")
		}
		time.Sleep(settling / 4)
	}
	s := stamp()
	other := file + ".new"
	if err := os.WriteFile(other, []byte("cc"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, file); err != nil {
		t.Fatal(err)
	}
	if s.Still(stamp()) {
		t.Error("another file of the name was not seen")
	}
	for _, of := range []func(string) (Stamp, error){StampOf, StampInMemory} {
		if now, err := of(file); err != nil || now != stamp() {
			t.Errorf("stamp %+v, %v; want %+v", now, err, stamp())
		}
		if _, err := of(file + ".none"); !os.IsNotExist(err) {
			t.Errorf("no file: %v", err)
		}
	}
}
