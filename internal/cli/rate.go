package cli

import (
	"fmt"
	"math"
	"time"
)

// rate is how many bytes a second a count grows by: an average in which what was seconds ago weighs less and less, so that it
// neither jumps with every read nor remembers for minutes how fast the beginning was. The zero value is ready.
type rate struct {
	begun, last time.Time
	n           int64
	mean        float64 // of bytes a second, weighted
	weight      float64 // what the weights so far sum to; less than 1 while there is little past
}

// rateMemory is the time after which a moment weighs 1/e.
const rateMemory = 3 * time.Second

// add takes the count as it stands at now. The first one only sets the start: a download that goes on from where another process
// was killed has not moved these bytes. A count that falls is one that began anew.
func (r *rate) add(now time.Time, n int64) {
	if r.last.IsZero() {
		r.begun, r.last, r.n = now, now, n
		return
	}
	dt := now.Sub(r.last)
	if n < r.n {
		r.n = n
	}
	if dt < 50*time.Millisecond {
		return // too short to divide by; the bytes count with the next
	}
	old := math.Exp(-dt.Seconds() / rateMemory.Seconds())
	r.mean = r.mean*old + float64(n-r.n)/dt.Seconds()*(1-old)
	r.weight = r.weight*old + 1 - old
	r.last, r.n = now, n
}

// perSecond is 0 while nothing is known.
func (r *rate) perSecond() float64 {
	if r.weight == 0 {
		return 0
	}
	return r.mean / r.weight
}

// eta is how long left bytes will take; ok is false while that is anybody's guess.
func (r *rate) eta(left int64) (d time.Duration, ok bool) {
	per := r.perSecond()
	if r.last.Sub(r.begun) < time.Second || per < 1 || left < 0 {
		return 0, false
	}
	s := float64(left) / per
	if s > 100*3600 {
		return 0, false
	}
	return time.Duration(s * float64(time.Second)), true
}

// brief writes a duration in at most 6 characters: 7s, 3m05s, 2h10m.
func brief(d time.Duration) string {
	s := int64(math.Ceil(d.Seconds()))
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	}
	return fmt.Sprintf("%dh%02dm", s/3600, s%3600/60)
}
