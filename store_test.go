package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// These tests hold the store to the promise at the top of store.go. Beside it
// they keep a [ledger], the plainest form of what was acknowledged: whatever
// happens, the [contents] of the store must be the same text. Things go wrong
// in three ways: somebody damages [files], an operation on the disk fails
// ([disk] is the seam), or there is a crash, of which a [platter] knows what
// it leaves.

func TestEverythingSurvivesARestart(t *testing.T) {
	a := audit(t, noSync)
	for _, c := range slices.Concat(life()...) {
		a.must(c)
	}
	a.survivesAKill("before")
	a.restart()
	a.survivesAKill("after a restart")
}

// TestAPlainModelAgrees makes thousands of random changes, many of which must
// be refused, and restarts now and then.
func TestAPlainModelAgrees(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	a := audit(t, noSync)
	a.must(person(a.newID()).signsUp("first@example.org"))
	for n := range 3000 {
		c := randomChange(r, &a.ledger, a.newID)
		if got, want := a.commit(c), a.ledger.do(c); !errors.Is(got, want) {
			t.Fatalf("change %d, %s: %v, want %v", n, inJSON(c), got, want)
		}
		if n%1000 == 999 {
			a.restart()
		}
		if n%50 == 49 {
			a.survivesAKill(fmt.Sprintf("after change %d", n))
		}
	}
}

func TestIDsRiseAndNeverRepeat(t *testing.T) {
	check := func(t *testing.T, ids []serial) {
		for n, id := range ids {
			if !isID.MatchString(id.String()) || n > 0 && id <= ids[n-1] {
				t.Errorf("in %d: %v", time.Now().Year(), ids[max(0, n-1):n+1])
			}
		}
	}
	a := audit(t, noSync)
	ids := make([][]serial, 8)
	atOnce(len(ids), func(n int) {
		for range 1000 {
			ids[n] = append(ids[n], a.newID())
		}
		check(t, ids[n])
	})
	check(t, slices.Sorted(slices.Values(slices.Concat(ids...))))

	// In the next run it is the year 2000, where synctest's clock begins, and
	// stands still.
	rises := func(last serial) {
		left := readFiles(t, a.path)
		synctest.Test(t, func(t *testing.T) {
			path := scratch(t)
			left.write(t, path)
			s := mustOpen(t, path)
			check(t, []serial{last, s.newID(), s.newID(), s.newID()})
		})
	}
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	rises(serial(p))
	last := a.newID()
	a.must(p.creates(last, "tea", 5))
	a.must(p.deletes(last)) // and still it never comes again
	rises(last)
	a.restart()
	rises(last)
}

// TestALogOutEndsOnesOwn has somebody else's key, past the first look.
func TestALogOutEndsOnesOwn(t *testing.T) {
	a := audit(t, noSync)
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	a.must(p.logsIn("key", 10))
	other := &session{Key: "key", UserID: a.newID()}
	if err := a.commit(change{LogOut: other}); err != nil {
		t.Error(err)
	}
	a.agrees("after another's log-out")
}

// TestSessionsThatEnd has log-ins at a second, each for 100 seconds. What has
// expired goes with the next log-in, by the times in the records; by the clock
// of today, all of these are long over.
func TestSessionsThatEnd(t *testing.T) {
	seconds := func(from, to int64) (list []int64) {
		for ; from <= to; from++ {
			list = append(list, from)
		}
		return list
	}
	a := audit(t, noSync)
	for n, test := range []struct {
		name         string
		logIns, left []int64
	}{
		{"none", seconds(1, 3), seconds(1, 3)},
		{"none, a second before the first expires", []int64{1, 100}, []int64{1, 100}},
		{"the first, the second it expires", []int64{1, 101}, []int64{101}},
		{"all that have expired", []int64{1, 2, 3, 50, 103}, []int64{50, 103}},
		{"none of a hundred", seconds(1, 100), seconds(1, 100)},
		{"the oldest of more", append(seconds(1, 100), 100, 100), append(seconds(3, 100), 100, 100)},
	} {
		p := somebody(n)
		a.must(p.signsUp(p.String() + "@example.org"))
		a.must(p.logsOut(p.String() + "-0")) // the session of the sign-up
		for at, second := range test.logIns {
			a.must(p.logsIn(fmt.Sprintf("%s-%d", p, at+1), second))
		}
		var left []int64
		for _, key := range a.logIns[serial(p)] {
			left = append(left, a.store.sessions[key].Start)
		}
		if !slices.Equal(left, test.left) {
			t.Errorf("ends %s: those of %d are left, want %d", test.name, left, test.left)
		}
		a.survivesAKill("ends " + test.name) // the replay ends the same
	}
}

func TestFilesAreForTheirOwnerAlone(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("there are no file modes")
	}
	entries, err := os.ReadDir(filepath.Dir(audit(t, noSync).path))
	if err != nil || len(entries) != 3 {
		t.Errorf("there are %v, want FILE, its journal and its lock (%v)", entries, err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has mode %s (%v)", e.Name(), info.Mode(), err)
		}
	}
}

func TestOtherFilesAreLeftAlone(t *testing.T) {
	a := audit(t, nil)
	a.must(somebody(1).signsUp("a@example.org"))
	others := []string{".journal.1", ".journal.000000009", ".journal.x", ".journal.00000009.bak", ".bak"}
	for _, other := range others {
		os.WriteFile(a.path+other, []byte("other"), 0o600)
	}
	a.restart()
	a.agrees("after a restart")
	for _, other := range others {
		if data, err := os.ReadFile(a.path + other); string(data) != "other" {
			t.Errorf("%s: %q, %v", other, data, err)
		}
	}
}

func TestOneProcessPerFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("there is no flock")
	}
	path := scratch(t)
	mustStart(t, path, noSync).close()
	alias := filepath.Join(t.TempDir(), "alias")
	if err := os.Symlink(path, alias); err != nil {
		t.Fatal(err)
	}
	var opened atomic.Int64
	atOnce(4, func(n int) {
		s, err := openStore([]string{path, alias}[n%2], quiet)
		if err == nil {
			opened.Add(1)
			t.Cleanup(func() { s.lock.Close() })
		} else if !strings.Contains(err.Error(), snapshotName+".lock is held") {
			t.Error(err)
		}
	})
	if opened.Load() != 1 {
		t.Errorf("%d of 4 opened the file at once", opened.Load())
	}
}

func TestFilesThatCannotBe(t *testing.T) {
	folder := t.TempDir()
	paths := []string{folder, filepath.Join(folder, "missing", snapshotName), filepath.Join(os.Args[0], snapshotName)}
	if runtime.GOOS != "windows" {
		paths = append(paths, audit(t, noSync).path) // this is its process
	}
	if os.Geteuid() > 0 { // root may write all the same
		readOnly := t.TempDir()
		os.Chmod(readOnly, 0o500)
		paths = append(paths, filepath.Join(readOnly, snapshotName))
	}
	ended, end := context.WithCancel(t.Context())
	end() // if one is served all the same
	for _, path := range paths {
		err := run(ended, []string{"-addr", "127.0.0.1:0", "-data", path, "-key", filepath.Join(folder, "key.pem")}, io.Discard)
		if err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if made, _ := os.ReadDir(folder); len(made) > 0 {
		t.Errorf("there is now %v", made)
	}
}

// Many at once:

func TestOneSignUpPerEmail(t *testing.T) {
	a := audit(t, noSync)
	for n := range 30 {
		var tries []change
		for try := range 8 {
			email := fmt.Sprintf("someone%d@example.org", n)
			if try%2 > 0 {
				email = strings.ToUpper(email)
			}
			tries = append(tries, person(a.newID()).signsUp(email))
		}
		winners := 0
		for at, err := range a.performAtOnce(n%2 > 0, tries...) {
			switch {
			case err == nil:
				winners++
				a.ledger.do(tries[at])
			case !errors.Is(err, errEmailTaken):
				t.Error(err)
			}
		}
		if winners != 1 {
			t.Errorf("%d of 8 signed up with one e-mail", winners)
		}
	}
	a.survivesAKill("at the end")
}

func TestAPutNeverBringsAnIdeaBack(t *testing.T) {
	a := audit(t, noSync)
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	for n := range 50 {
		id := a.newID()
		a.must(p.creates(id, "tea", 5))
		put, deletion := p.updates(id, "coffee", 6), p.deletes(id)
		errs := a.performAtOnce(n%2 > 0, put, put, deletion, put, put, deletion)
		if (errs[2] == nil) == (errs[5] == nil) {
			t.Errorf("two deletions: %v, %v", errs[2], errs[5])
		}
		if err := a.commit(put); !errors.Is(err, errNoIdea) {
			t.Errorf("a put after the deletion: %v", err)
		}
		a.ledger.do(deletion)
		a.survivesAKill("after a deletion")
	}
}

// TestManyAtOnceBesideCompactions has eight people change what is theirs, each
// with a ledger, while others read and the store compacts all the time.
func TestManyAtOnceBesideCompactions(t *testing.T) {
	var a *audited
	var written atomic.Int32 // how often FILE was
	a = audit(t, func(op, path string, do func() error) error {
		switch {
		case op == "write" && strings.Contains(path, ".journal."):
			a.limit, a.nextRenew = 4<<10, time.Time{} // under diskMu, as this is
		case op == "rename":
			written.Add(1)
		}
		return noSync(op, path, do)
	})
	ledgers := make([]ledger, 8)
	var writers, readers sync.WaitGroup
	var done atomic.Bool
	for n := range ledgers {
		p := person(a.newID())
		writers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), 0))
			mine := &ledgers[n]
			c := p.signsUp(p.String() + "@example.org")
			for n := 0; n < 1500 || written.Load() < 5; n++ {
				if got, want := a.commit(c), mine.do(c); !errors.Is(got, want) {
					t.Errorf("%s: %v, want %v", inJSON(c), got, want)
				}
				c = randomChange(r, mine, a.newID)
			}
		})
		readers.Go(func() {
			for page := 1; !done.Load(); page = page%3 + 1 {
				ideas, total := listed(a.store, serial(p), page)
				if len(ideas) != min(pageSize, max(0, total-(page-1)*pageSize)) || !slices.IsSortedFunc(ideas, bestFirst) {
					t.Errorf("page %d of %d ideas has %d, or out of order", page, total, len(ideas))
				}
				time.Sleep(100 * time.Microsecond)
			}
		})
	}
	writers.Wait()
	done.Store(true)
	readers.Wait()
	settle(a.store)
	for _, l := range ledgers {
		a.ledger.users = append(a.ledger.users, l.users...)
		a.ledger.sessions = append(a.ledger.sessions, l.sessions...)
		a.ledger.ideas = append(a.ledger.ideas, l.ideas...)
	}
	a.survivesAKill("at the end")
	if a.base < 5 {
		t.Errorf("FILE was written %d times only", a.base)
	}
	a.restart()
	a.survivesAKill("after a restart")
}

// The order of things: on disk, then in memory, then answered.

func TestAnAnswerComesAfterTheSync(t *testing.T) {
	disk := newPlatter(nil)
	a := audit(t, disk.step)
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	atOnce(16, func(int) {
		for range 10 {
			id := a.newID()
			if err := a.commit(p.creates(id, "tea", 5)); err != nil {
				t.Error(err)
			}
			disk.mu.Lock()
			if !strings.Contains(fmt.Sprint(crashes["a power loss"](disk)), id.String()) {
				t.Errorf("%s was answered, and a power loss would lose it", id)
			}
			disk.mu.Unlock()
		}
	})
}

func TestNobodySeesWhatIsNotOnDisk(t *testing.T) {
	var slow atomic.Bool
	reached, goOn := make(chan string), make(chan struct{})
	a := audit(t, func(op, path string, do func() error) error {
		if slow.Load() {
			reached <- op
			<-goOn
		}
		return do()
	})
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	a.must(p.creates(ideaID(1), "tea", 5))
	slow.Store(true)
	for _, c := range p.everyChange() {
		answered := make(chan error)
		go func() { answered <- a.commit(c) }()
		for _, op := range []string{"write", "sync"} {
			select {
			case got := <-reached:
				if got != op {
					t.Fatalf("%s where %s was to come", got, op)
				}
			case err := <-answered:
				t.Fatalf("%s: answered %v before the %s", inJSON(c), err, op)
			}
			a.agrees("before the " + op + " of " + inJSON(c))
			goOn <- struct{}{}
		}
		if err := <-answered; err != nil {
			t.Fatal(err)
		}
		a.ledger.do(c)
		a.agrees("after " + inJSON(c))
	}
	slow.Store(false)
}

// Recovery: what was never acknowledged is dropped, and any other damage
// refused, with nothing touched.

// TestAJournalCutAnywhere opens every prefix of a journal: it holds the whole
// commits in it, and nothing of the next.
func TestAJournalCutAnywhere(t *testing.T) {
	left, lines, states := short(t)
	path := scratch(t)
	journal := strings.Join(lines, "")
	for cut := range len(journal) + 1 {
		left[journal2] = journal[:cut]
		compare(t, fmt.Sprintf("cut at byte %d", cut), left.read(t, path), states[strings.Count(journal[:cut], "\n")])
	}
}

// TestAFlippedBitIsRefused flips every bit of a journal and of its snapshot,
// one at a time. The last newline is not among them: without it a line is torn.
func TestAFlippedBitIsRefused(t *testing.T) {
	whole, _, _ := short(t)
	path := scratch(t)
	for name, data := range whole {
		line := 1
		for at := range len(data) - 1 {
			place := name + ": "
			if name != snapshotName {
				place = fmt.Sprintf("%s:%d: ", name, line)
			}
			for bit := range 8 {
				flipped := []byte(data)
				flipped[at] ^= 1 << bit
				damaged := maps.Clone(whole)
				damaged[name] = string(flipped)
				damaged.refused(t, path, fmt.Sprintf("%s with bit %d of byte %d flipped", name, bit, at), place)
			}
			if data[at] == '\n' {
				line++
			}
		}
	}
}

// TestALostBlock puts zeros where the power went before a block of a line
// reached the disk. In the last line that is no damage: it was not fsynced.
func TestALostBlock(t *testing.T) {
	left, lines, states := short(t)
	last, path := len(lines)-1, scratch(t)
	for at, line := range lines {
		n := len(line)
		for _, lost := range [][2]int{{0, 1}, {0, n / 2}, {n / 3, n / 2}, {n - 3, n - 1}, {0, n}, {n / 2, n}, {n - 1, n}} {
			damaged := slices.Clone(lines)
			damaged[at] = line[:lost[0]] + strings.Repeat("\x00", lost[1]-lost[0]) + line[lost[1]:]
			left[journal2] = strings.Join(damaged, "")
			name := fmt.Sprintf("line %d of %d without bytes %d", at+1, len(lines), lost)
			switch {
			case at == last:
				compare(t, name, left.read(t, path), states[at])
			case lost[1] < n: // else it is one line with the next
				left.refused(t, path, name, fmt.Sprintf("%s:%d: ", journal2, at+1))
			}
		}
	}
}

func TestDamageIsRefused(t *testing.T) {
	type damage struct {
		name  string
		do    func(f files)
		error string
	}
	snapshot := func(name, data, error string) damage {
		return damage{name, func(f files) { f[snapshotName] = data }, snapshotName + ": " + error}
	}
	edit := func(name, old, new, error string) damage {
		return damage{name, func(f files) { f.edit(old, new) }, error}
	}
	const (
		idea1    = snapshotName + `: idea "idea00001": cannot be right`
		user1    = snapshotName + `: user "user00001": cannot be right`
		session1 = snapshotName + `: session "user00001-0": cannot be right`
	)
	whole, states := chain(t)
	file, path := whole[snapshotName], scratch(t)
	_, err := os.Stat(path)
	missing := errors.Unwrap(err).Error() // in the words of this system
	compare(t, "undamaged", whole.read(t, path), states[len(states)-1])
	tests := []damage{
		snapshot("empty", "", "is damaged"),
		snapshot("blank", "\n", "is damaged"),
		snapshot("{}", "{}", "is not a file of ideapool"),
		snapshot("[]", "[]", "is damaged"),
		snapshot("null", "null", "is not a file of ideapool"),
		snapshot("foreign", `{"foo":1}`, "is damaged"),
		snapshot("a newer format", `{"format":2,"new":{}}`, "has format 2"),
		snapshot("something behind it", file+"{}", "is damaged: something follows"),
		snapshot("an edit with the old crc32c", strings.Replace(file, "tea", "pea", 1), "is damaged: the checksum"),
		snapshot("a wrong crc32c", strings.Replace(file, `"crc32c":"`, `"crc32c":"0`, 1), "is damaged: the checksum"),

		edit("an idea without its user", `"owner":"user00001"`, `"owner":"user00009"`, idea1),
		edit("no idea", `"ideas":[`, `"ideas":[null,`, snapshotName+": an idea cannot be right"),
		{"a field of a newer ideapool", func(f files) {
			text := strings.Replace(file, `"content":"tea"`, `"content":"tea","mood":7`, 1)
			f[snapshotName] = regexp.MustCompile(`\w{8}("}\s*)$`).ReplaceAllString(text, sumOf([]byte(text))+"$1")
		}, snapshotName + ": is damaged: json: unknown field"},
		edit("a mistyped name", `"owner"`, `"ownr"`, snapshotName+": is damaged: json: unknown field"),
		edit("score 12", `"tea","impact":5`, `"tea","impact":12`, idea1),
		edit("score 0", `"tea","impact":5`, `"tea","impact":0`, idea1),
		edit("score 5.5", `"tea","impact":5`, `"tea","impact":5.5`, snapshotName+": is damaged"),
		edit("no content", `"tea"`, `""`, idea1),
		edit("an id in capitals", `"id":"idea00001"`, `"id":"IDEA00001"`, snapshotName+`: is damaged: the id "IDEA00001" cannot be right`),
		edit("a short id", `"id":"idea00001"`, `"id":"idea1"`, snapshotName+`: is damaged: the id "idea1" cannot be right`),
		edit("an id of the year 2291", `"id":"idea00001"`, `"id":"zzzzzzzzz"`, snapshotName+`: an id after "z00000000": cannot be right`),
		edit("a last id that wraps around", `"last_id":`, `"last_id":184466`, snapshotName+`: an id after`),
		edit("an idea with no id", `"id":"idea00001"`, `"id":null`, snapshotName+`: idea "0": cannot be right`),
		edit("a user with no id", `"id":"user00001"`, `"id":null`, snapshotName+`: user "0": cannot be right`),
		edit("an idea twice", `"id":"idea00002"`, `"id":"idea00001"`, idea1),
		edit("a user twice", `"id":"user00002"`, `"id":"user00001"`, user1),
		edit("an e-mail twice", "b@example.org", "A@EXAMPLE.ORG", errEmailTaken.Error()),
		edit("a session twice", "user00002-0", "user00001-0", session1),
		edit("a session without its user", `"user":"user00001"`, `"user":"user00009"`, session1),
		edit("another store", `"store":"`, `"store":"X`, journal2+":1: is damaged"),

		{"no snapshot", func(f files) { delete(f, snapshotName) }, journal2 + " holds changes"},
		{"no journal 2", func(f files) { delete(f, journal2) }, journal2 + ": " + missing},
		{"no journal", func(f files) { delete(f, journal2); delete(f, journal3) }, journal2 + ": " + missing},
		{"journals swapped", func(f files) { f[journal2], f[journal3] = f[journal3], f[journal2] }, journal2 + ":1: is damaged"},
		{"a journal twice", func(f files) { f[journal3] = f[journal2] }, journal3 + ":1: is damaged"},
		{"a torn journal that goes on", func(f files) { f[journal2] = strings.TrimRight(f[journal2], "\n") }, journal3 + " goes on"},
		{"a line twice", func(f files) { f[journal2] += f[journal2] }, journal2 + ":4: is damaged"},
		{"no first line", func(f files) { _, f[journal2], _ = strings.Cut(f[journal2], "\n") }, journal2 + ":1: is damaged"},
		{"an empty line", func(f files) { f[journal2] += "\n" }, journal2 + ":4: is damaged"},
	}
	for cut := 1; cut < len(file)-1; cut += 20 {
		tests = append(tests, snapshot(fmt.Sprintf("cut at %d", cut), file[:cut], "is damaged"))
	}
	// Lines with the right checksum that contradict what is before:
	id := regexp.MustCompile(`"store":"(\w+)"`).FindStringSubmatch(file)[1]
	for name, c := range map[string]change{
		"a user without a session":   {User: &user{ID: serial(somebody(9)), Email: "c@example.org"}},
		"an idea without its user":   somebody(9).creates(ideaID(9), "tea", 5),
		"score 12":                   somebody(1).creates(ideaID(9), "tea", 12),
		"an idea twice":              somebody(1).creates(ideaID(1), "tea", 5),
		"a user twice":               somebody(1).signsUp("new@example.org"),
		"a session twice":            somebody(1).logsIn("user00001-0", 10),
		"a session without its user": somebody(9).logsIn("key", 10),
	} {
		line, _ := encodeLine((&store{id: id}).firstSum(3), []*pending{{text: []byte(inJSON(c))}})
		tests = append(tests, damage{"a line with " + name, func(f files) { f[journal3] = string(line) }, journal3 + ":1: cannot be right"})
	}
	for _, test := range tests {
		damaged := maps.Clone(whole)
		test.do(damaged)
		damaged.refused(t, path, test.name, test.error)
	}
}

// TestAHandEditIsAccepted has somebody edit FILE and remove its crc32c.
func TestAHandEditIsAccepted(t *testing.T) {
	whole, states := chain(t)
	whole.edit(`"content":"tea"`, `"content":"pea"`)
	want := strings.ReplaceAll(states[len(states)-1], `"content":"tea"`, `"content":"pea"`)
	compare(t, "as it is", whole.read(t, scratch(t)), want)
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, []byte(whole[snapshotName]), "", "\t"); err != nil {
		t.Fatal(err)
	}
	whole[snapshotName] = pretty.String()
	compare(t, "pretty-printed", whole.read(t, scratch(t)), want)
}

// Crashes:

// crashes are the ways in which one can leave a folder. A power loss may lose
// what was not fsynced, and need not: POSIX leaves open in what order names
// and bytes reach the disk.
var crashes = map[string]func(p *platter) files{
	"a kill": func(p *platter) files {
		return left(p.live, func(_, written string) string { return written })
	},
	"a power loss": func(p *platter) files {
		return left(p.durable, func(synced, _ string) string { return synced })
	},
	"a power loss that spares the names": func(p *platter) files {
		return left(p.live, func(synced, _ string) string { return synced })
	},
	"a power loss that spares the removals": func(p *platter) files {
		names := maps.Clone(p.durable)
		maps.DeleteFunc(names, func(name string, _ *platterFile) bool { return p.live[name] == nil })
		return left(names, func(synced, _ string) string { return synced })
	},
	"a power loss that spares half": func(p *platter) files {
		return left(p.live, func(synced, written string) string {
			rest := strings.TrimPrefix(written, synced)
			return synced + rest[:len(rest)/2]
		})
	},
	"a power loss with a lost block": func(p *platter) files {
		return left(p.live, func(synced, written string) string {
			rest := strings.TrimPrefix(written, synced)
			return synced + strings.Repeat("\x00", len(rest)/2) + rest[len(rest)/2:]
		})
	},
}

// A moment is one at which everything may crash.
type moment struct {
	name string
	left files
	want []string // with all changes, and without the one under way
}

// TestACrashLosesNothing takes a store through its life, and looks before every
// file operation at what each kind of crash would leave. A new store must read
// from that what was acknowledged, and the change under way wholly or not at
// all. While it starts it may crash again, and the same must be left.
func TestACrashLosesNothing(t *testing.T) {
	moments := crashMoments(t)
	path, second := scratch(t), scratch(t)
	seen := make(map[string]bool) // many look the same
	for _, m := range moments {
		key := fmt.Sprint(m.left, m.want)
		if seen[key] {
			continue
		}
		seen[key] = true
		got := m.left.read(t, path)
		if !slices.Contains(m.want, got) {
			compare(t, m.name, got, m.want[0])
			continue
		}
		disk := newPlatter(m.left)
		disk.before = func(op string) {
			for kind, left := range crashes {
				left := left(disk)
				if key := fmt.Sprint(left, got); !seen[key] {
					seen[key] = true
					compare(t, m.name+", and in the next start before "+op+" "+kind, left.read(t, second), got)
				}
			}
		}
		s, err := openStore(path, quiet)
		if err != nil {
			t.Fatal(err)
		}
		if s.disk = disk.step; s.start() != nil {
			t.Errorf("%s: does not start", m.name)
		}
		disk.before("the end")
		abandon(s)
	}
	t.Logf("%d moments, %d different folders", len(moments), len(seen))
}

func crashMoments(t *testing.T) (moments []moment) {
	var (
		disk     = newPlatter(nil)
		path     = scratch(t)
		s        *store
		all      []change // acknowledged, but for the last if it is
		underWay bool
		turn     sync.Mutex // one is under way at a time
		beside   []change   // to be made while the store compacts
	)
	disk.before = func(op string) {
		want := []string{after(all)}
		if underWay {
			want = append(want, after(all[:len(all)-1]))
		}
		for kind, left := range crashes {
			moments = append(moments, moment{fmt.Sprintf("before operation %d, %s, %s", len(moments)/len(crashes), op, kind), left(disk), want})
		}
	}
	note := func(begins bool, changes ...change) {
		disk.mu.Lock()
		defer disk.mu.Unlock()
		underWay, all = begins, append(all, changes...)
	}
	must := func(c change) {
		turn.Lock()
		defer turn.Unlock()
		note(true, c)
		if err := s.commit(c); err != nil {
			t.Errorf("%s: %v", inJSON(c), err)
		}
		note(false)
	}
	step := func(op, path string, do func() error) error {
		if len(beside) > 0 && (op == "create" && strings.HasSuffix(path, ".tmp") || op == "rename") {
			must(beside[0]) // goes to a journal that FILE does not name yet
			beside = beside[1:]
		}
		return disk.step(op, path, do)
	}
	for _, changes := range life() {
		s = mustStart(t, path, step)
		half := len(changes) / 2
		for _, c := range changes[:half] {
			must(c)
		}
		beside, s.limit = changes[half+1:half+3], 0
		must(changes[half]) // is one too many: the store compacts
		settle(s)
		for _, c := range changes[half+3:] {
			must(c)
		}
		if err := s.close(); err != nil {
			t.Fatal(err)
		}
	}
	disk.before("the end")
	if s.base < 7 {
		t.Errorf("FILE was written %d times, want a start, and 3 times a compaction and a close", s.base)
	}
	return moments
}

// TestSIGKILLUnderLoad kills the server, in a process of its own, under the
// load of 16 visitors, again and again over the same files, and once more
// while it starts.
func TestSIGKILLUnderLoad(t *testing.T) {
	path, all := crowd(t)
	acknowledged := 0
	for range 6 {
		early := startChild(t, path)
		time.Sleep(rand.N(60 * time.Millisecond))
		early.kill()

		c := startChild(t, path)
		acknowledged += c.underLoad(t, all, 100+rand.IntN(1200), os.Kill)
		if strings.Contains(c.said(), "DATA RACE") || strings.Contains(c.said(), "panic") {
			t.Error(c.said())
		}
		s := mustOpen(t, path)
		checkAll(t, all, s)
		s.lock.Close()
	}
	t.Logf("%d acknowledged writes; left: %s", acknowledged, slices.Sorted(maps.Keys(readFiles(t, path))))
}

// TestSIGTERMUnderLoad stops it in the orderly way.
func TestSIGTERMUnderLoad(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("there are no signals")
	}
	path, all := crowd(t)
	c := startChild(t, path)
	c.underLoad(t, all, 500, syscall.SIGTERM)
	if !c.ProcessState.Success() {
		t.Errorf("%s\n%s", c.ProcessState, c.said())
	}
	left := readFiles(t, path)
	checkAll(t, all, mustOpen(t, path))
	delete(left, snapshotName)
	if journals := slices.Collect(maps.Values(left)); !slices.Equal(journals, []string{""}) {
		t.Errorf("beside FILE there is %.100q, want an empty journal", journals)
	}
}

// The failing disk:

var errInjected = errors.New("injected")

// TestAFailureAtAnyOperation lets the n-th operation of a store's life fail,
// for all n: with no effect, or with half of it or all. A change is then
// refused and never seen, nothing else is lost, and the store heals by itself.
func TestAFailureAtAnyOperation(t *testing.T) {
	for n, failed := 0, true; failed; n++ {
		for _, half := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				count := 0
				name := fmt.Sprintf("operation %d fails (half: %t)", n, half)
				failed = failAt(t, name, func(op, path string, do func() error) error {
					count++
					switch {
					case count != n+1:
						return noSync(op, path, do)
					case half && op == "write":
						return halfWrite(path, do)
					case half:
						do()
					}
					return errInjected
				})
			})
		}
	}
}

// failAt leads a life on a disk that fails once, and returns whether it did.
func failAt(t *testing.T, name string, disk disk) (failed bool) {
	watched := func(op, path string, do func() error) error {
		err := disk(op, path, do)
		failed = failed || err != nil
		return err
	}
	a := &audited{t: t, scratch: scratch(t)}
	path := scratch(t)
	for _, changes := range life() {
		a.store = mustOpen(t, path)
		if a.disk = watched; a.start() != nil {
			a.close() // the process ends, and somebody starts another
			a.store = mustStart(t, path, watched)
		}
		a.limit = 500
		for _, c := range changes {
			err := a.commit(c)
			for try := 0; err != nil && try < 3; try++ {
				if !errors.Is(err, errNotStored) {
					t.Errorf("%s: %s: %v", name, inJSON(c), err)
				}
				a.agrees(name + ", refused")
				synctest.Wait() // until it has healed, or tried to
				a.survivesAKill(name + ", refused")
				time.Sleep(2 * time.Second) // by synctest's clock
				err = a.commit(c)
			}
			if err != nil {
				t.Fatalf("%s: does not heal", name)
			}
			synctest.Wait() // for the compaction
			a.ledger.do(c)
			a.agrees(name)
		}
		a.survivesAKill(name)
		a.close() // may fail, but loses nothing
		a.survivesAKill(name + ", and a close")
	}
	return failed
}

// TestAJournalThatFailedIsNotWrittenAgain has a failed fsync, after which
// nobody knows what the file holds, and a failed cut, which leaves half a line.
func TestAJournalThatFailedIsNotWrittenAgain(t *testing.T) {
	const (
		healthy = iota
		failing
		abandoned // and there is no way to heal
		healing
	)
	for _, failed := range []string{"sync", "truncate"} {
		synctest.Test(t, func(t *testing.T) {
			var phase, made atomic.Int64
			a := audit(t, func(op, path string, do func() error) error {
				first := strings.HasSuffix(path, ".journal.00000001")
				switch now := phase.Load(); {
				case now == failing && op == failed:
					return errInjected
				case now == failing && op == "write" && failed == "truncate":
					return halfWrite(path, do)
				case now == abandoned && op == "create" && made.Add(1)%3 == 1:
					return errInjected // no journal; the next time there is one, and then no snapshot
				case now == abandoned && op == "rename":
					return errInjected
				case now >= abandoned && first && op != "remove":
					t.Errorf("after a failed %s there is a %s", failed, op)
				}
				return do()
			})
			refused := func(err error) {
				t.Helper()
				if synctest.Wait(); !errors.Is(err, errNotStored) {
					t.Errorf("after a failed %s: %v", failed, err)
				}
			}
			p := person(a.newID())
			a.must(p.signsUp("a@example.org"))
			a.must(p.creates(ideaID(1), "tea", 5))
			phase.Store(failing)
			refused(a.commit(p.creates(ideaID(2), "coffee", 5)))
			phase.Store(abandoned)
			for second := range int64(3) {
				for range 50 {
					refused(a.commit(p.updates(ideaID(1), "coffee", 5)))
					refused(a.check())
				}
				if want := []int64{1, 3, 4}[second]; made.Load() != want {
					t.Errorf("made %d files to heal in %d seconds, want %d", made.Load(), second+1, want)
				}
				time.Sleep(time.Second + 1)
			}
			a.survivesAKill("meanwhile")

			phase.Store(healing)
			refused(a.check()) // it heals beside
			if err := a.check(); err != nil {
				t.Errorf("has not healed from a failed %s: %v", failed, err)
			}
			a.must(p.updates(ideaID(1), "cocoa", 5))
			a.survivesAKill("healed")
		})
	}
}

func TestAFullDisk(t *testing.T) {
	var full atomic.Bool
	a := audit(t, func(op, path string, do func() error) error {
		if full.Load() && op == "write" {
			return halfWrite(path, do)
		}
		return noSync(op, path, do)
	})
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	a.must(p.creates(ideaID(1), "tea", 5))
	before := readFiles(t, a.path)

	full.Store(true)
	for _, c := range p.everyChange() {
		if err := a.commit(c); !errors.Is(err, errNotStored) {
			t.Errorf("%s: %v", inJSON(c), err)
		}
		a.agrees("refused " + inJSON(c))
		if !maps.Equal(readFiles(t, a.path), before) {
			t.Errorf("%s: the journal was not cut back", inJSON(c))
		}
	}
	health := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		newServer(options{}, new(rsa.PrivateKey), a.store, quiet).
			ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/healthz", nil))
		return w
	}
	if w := health(); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("/healthz: %d, %v", w.Code, w.Header())
	}
	if err := a.start(); err == nil { // as a compaction
		t.Error("a snapshot was written")
	}
	if left := readFiles(t, a.path); left[snapshotName] != before[snapshotName] || left[snapshotName+".tmp"] != "" {
		t.Error("a snapshot that failed has left something")
	}
	a.survivesAKill("full")

	full.Store(false)
	if w := health(); w.Code != http.StatusOK {
		t.Errorf("there is room, and /healthz: %d", w.Code)
	}
	a.must(p.creates(ideaID(2), "tea", 5))
	a.survivesAKill("at the end")
}

// TestChangesShareAnFsync lets 64 people come one after the other. The first must
// wait for those who follow.
func TestChangesShareAnFsync(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var syncs atomic.Int32
	a := audit(t, func(op, path string, do func() error) error {
		if op == "sync" && strings.Contains(path, ".journal.") {
			syncs.Add(1)
		}
		return noSync(op, path, do) // takes no time in which others could join
	})
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	syncs.Store(0)
	atOnce(64, func(n int) {
		for range n % 4 {
			runtime.Gosched()
		}
		if err := a.commit(p.creates(ideaID(n), "tea", 5)); err != nil {
			t.Error(err)
		}
	})
	if n := syncs.Load(); n > 3 {
		t.Errorf("64 changes at once took %d fsyncs", n)
	}
}

// TestProbe looks whether there is no room for any change when there is none for
// what check writes.
func TestProbe(t *testing.T) {
	a := audit(t, noSync)
	a.failing.Store(true)
	before := a.size
	if err := a.check(); err != nil {
		t.Fatal(err)
	}
	probe := int(a.size - before)
	longest := change{
		User:    &user{ID: minSerial, Email: strings.Repeat("&", maxEmail), Name: strings.Repeat("<", maxName), Password: noPassword},
		Session: &session{Key: keyOf(""), UserID: minSerial, Start: 1e10, Expires: 1e10},
	}
	if text, _ := longest.record(); len(text) > probe {
		t.Errorf("a sign-up may take %d bytes, the probe takes %d", len(text), probe)
	}
}

// TestRenewsAreSeldom lets every fsync of a journal fail, so that each change has a
// new one made, which works.
func TestRenewsAreSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		snapshots := 0
		a := audit(t, func(op, path string, do func() error) error {
			switch {
			case op == "sync" && strings.Contains(path, ".journal."):
				return syscall.EIO
			case op == "rename":
				snapshots++
			}
			return do()
		})
		snapshots = 0
		for range 100 {
			a.commit(somebody(1).signsUp("a@example.org"))
			synctest.Wait()
		}
		if snapshots != 1 {
			t.Errorf("there were %d snapshots within a second, want 1", snapshots)
		}
	})
}

// TestBytesOfACreate looks when journals and snapshots together come to most:
// after a snapshot.
func TestBytesOfACreate(t *testing.T) {
	const limit, snapshots = 400, 4
	var written atomic.Int64
	weigh := weigh(&written)
	var a *audited
	a = audit(t, func(op, path string, do func() error) error {
		if strings.Contains(path, ".journal.") && op == "write" {
			a.nextRenew = time.Time{} // under diskMu, as this is
		}
		return noSync(op, path, func() error { return weigh(op, path, do) })
	})
	p := person(a.newID())
	a.must(p.signsUp("a@example.org"))
	creates := int64(0)
	for number := a.base; number < snapshots; creates++ {
		if err := a.commit(p.creates(a.newID(), "the-content", 8)); err != nil {
			t.Fatal(err)
		}
		if creates%100 == 0 {
			settle(a.store)
			number = a.base
		}
	}
	if each := written.Load() / creates; each > limit {
		t.Errorf("%d creates took %d bytes each, and %d are the most", creates, each, limit)
	}
	for range 2 {
		if info, err := os.Stat(a.path); err != nil || a.limit != 2*info.Size() {
			t.Errorf("the next snapshot comes after %d bytes of journal, for one of %d bytes (%v)", a.limit, info.Size(), err)
		}
		a.restart()
	}
}

// BenchmarkStore makes ideas durable; disk-B/op counts the bytes of journals
// and snapshots.
func BenchmarkStore(b *testing.B) {
	for _, writers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("create/writers=%d", writers), func(b *testing.B) {
			var written atomic.Int64
			a := audit(b, weigh(&written))
			p := person(a.newID())
			a.must(p.signsUp("a@example.org"))
			work := make(chan struct{})
			var wg sync.WaitGroup
			for range writers {
				wg.Go(func() {
					for range work {
						if err := a.commit(p.creates(a.newID(), "Drink a cup of tea", 1+rand.IntN(10))); err != nil {
							b.Error(err)
						}
					}
				})
			}
			b.ReportAllocs()
			for b.Loop() {
				work <- struct{}{}
			}
			close(work)
			wg.Wait()
			settle(a.store)
			b.ReportMetric(float64(written.Load())/float64(b.N), "disk-B/op")
		})
	}
}

// What people do:

// A person is a user's id, and makes changes.
type person serial

func (p person) String() string { return serial(p).String() }

func somebody(n int) person { return person(parseSerial(fmt.Sprintf("user%05d", n))) }

func ideaID(n int) serial { return parseSerial(fmt.Sprintf("idea%05d", n)) }

func (p person) signsUp(email string) change {
	u := user{ID: serial(p), Email: email, Name: "Any Name", Password: "hash"}
	return change{User: &u, Session: p.logsIn(p.String()+"-0", 1).Session}
}

func (p person) logsIn(key string, second int64) change {
	return change{Session: &session{Key: key, UserID: serial(p), Start: second, Expires: second + 100}}
}

func (p person) logsOut(key string) change {
	return change{LogOut: &session{Key: key, UserID: serial(p)}}
}

func (p person) creates(id serial, content string, impact int) change {
	i := &idea{ID: id, Content: content, Impact: impact, Ease: 5, Confidence: 5, Created: 1_600_000_000, Owner: serial(p)}
	i.seal() // fails for an idea that is to be refused
	return change{Create: i}
}

func (p person) updates(id serial, content string, impact int) change {
	return change{Update: p.creates(id, content, impact).Create}
}

func (p person) deletes(id serial) change {
	return change{Delete: &idea{ID: id, Owner: serial(p)}}
}

// everyChange is one of each kind, by somebody with idea00001.
func (p person) everyChange() []change {
	return []change{
		p.creates(ideaID(2), "tea", 5), p.updates(ideaID(1), "coffee", 6), p.deletes(ideaID(1)),
		p.logsIn("key", 10), p.logsOut(p.String() + "-0"), somebody(2).signsUp("b@example.org"),
	}
}

// life is all that people do, in three runs of the server.
func life() [][]change {
	ann, bob, carl := somebody(1), somebody(2), somebody(3)
	return [][]change{{
		ann.signsUp("Ann@example.org"),
		ann.creates(ideaID(1), "tea", 5),
		bob.signsUp("bob@example.org"),
		bob.creates(ideaID(2), "rain", 6),
		ann.logsIn("ann-1", 50),
		ann.updates(ideaID(1), "green tea", 7),
		ann.creates(ideaID(3), "biscuits", 5),
		bob.deletes(ideaID(2)),
		ann.logsOut("user00001-0"),
		ann.creates(ideaID(4), "scones", 5),
	}, {
		bob.creates(ideaID(5), "sun", 10),
		ann.deletes(ideaID(3)),
		ann.creates(ideaID(6), "jam", 8),
		bob.updates(ideaID(5), "more sun", 10),
		bob.logsIn("bob-1", 101), // ends the session of the sign-up
		ann.logsOut("ann-1"),
	}, {
		ann.deletes(ideaID(1)),
		carl.signsUp("carl@example.org"),
		bob.logsOut("bob-1"),
		bob.deletes(ideaID(5)),
		carl.creates(ideaID(7), "a boat", 10),
	}}
}

// randomChange may also be one that must be refused: of an idea that is
// somebody else's or gone, or with an e-mail that is taken.
func randomChange(r *rand.Rand, l *ledger, newID func() serial) change {
	p := person(l.users[r.IntN(len(l.users))].ID)
	id, old := newID(), session{UserID: serial(p)}
	if len(l.ideas) > 0 && r.IntN(20) > 0 {
		id = l.ideas[r.IntN(len(l.ideas))].ID
	}
	if len(l.sessions) > 0 {
		old = l.sessions[r.IntN(len(l.sessions))]
	}
	l.second += r.Int64N(5)
	switch n := r.IntN(100); {
	case n < 5:
		email := fmt.Sprintf("x%d-%s@example.org", r.IntN(100), l.users[0].ID)
		if n < 2 {
			email = strings.ToUpper(email)
		}
		return person(newID()).signsUp(email)
	case n < 20:
		return p.logsIn(fmt.Sprint(r.Uint64()), l.second)
	case n < 25:
		return p.logsOut(old.Key)
	case n < 30:
		return person(old.UserID).logsOut(old.Key)
	case n < 60:
		return p.creates(newID(), "<é> & \u2028", 1+r.IntN(10))
	case n < 80:
		return p.updates(id, "changed", 1+r.IntN(10))
	default:
		return p.deletes(id)
	}
}

func inJSON(c change) string {
	data, _ := json.Marshal(c)
	return string(data)
}

// A ledger holds what was acknowledged.
type ledger struct {
	users    []user
	sessions []session
	ideas    []*idea
	second   int64 // for log-ins
}

// do makes a change, or returns why it must be refused.
func (l *ledger) do(c change) error {
	switch {
	case c.User != nil:
		if slices.ContainsFunc(l.users, func(u user) bool { return strings.EqualFold(u.Email, c.User.Email) }) {
			return errEmailTaken
		}
		l.users = append(l.users, *c.User)
		l.sessions = append(l.sessions, *c.Session)
	case c.Session != nil:
		mine := func(s session) bool { return s.UserID == c.Session.UserID }
		for {
			oldest := slices.IndexFunc(l.sessions, mine)
			if oldest < 0 || count(l.sessions, mine) < 100 && l.sessions[oldest].Expires > c.Session.Start {
				break
			}
			l.sessions = slices.Delete(l.sessions, oldest, oldest+1)
		}
		l.sessions = append(l.sessions, *c.Session)
	case c.LogOut != nil:
		l.sessions = slices.DeleteFunc(l.sessions, func(s session) bool {
			return s.Key == c.LogOut.Key && s.UserID == c.LogOut.UserID
		})
	case c.Create != nil:
		l.ideas = append(l.ideas, c.Create)
	default:
		changed := cmp.Or(c.Update, c.Delete)
		at := slices.IndexFunc(l.ideas, func(i *idea) bool { return i.ID == changed.ID && i.Owner == changed.Owner })
		if at < 0 {
			return errNoIdea
		}
		l.ideas = slices.Delete(l.ideas, at, at+1)
		if c.Update != nil {
			l.ideas = append(l.ideas, c.Update)
		}
	}
	return nil
}

func count[T any](list []T, is func(T) bool) (n int) {
	for _, element := range list {
		if is(element) {
			n++
		}
	}
	return n
}

// after returns what there is after some changes.
func after(changes []change) string {
	var l ledger
	for _, c := range changes {
		l.do(c)
	}
	return l.String()
}

func (l *ledger) String() string {
	sessions, ideas := make(map[serial][]session), make(map[serial][]*idea)
	for _, s := range l.sessions {
		sessions[s.UserID] = append(sessions[s.UserID], s)
	}
	for _, i := range slices.SortedFunc(slices.Values(l.ideas), bestFirst) {
		ideas[i.Owner] = append(ideas[i.Owner], i)
	}
	return describe(slices.Clone(l.users), sessions, ideas)
}

func bestFirst(a, b *idea) int {
	return -cmp.Or(cmp.Compare(a.Average, b.Average), cmp.Compare(a.ID, b.ID))
}

// contents asks the store, at rest, for all that it has.
func contents(s *store) string {
	users := slices.Collect(maps.Values(s.users))
	sessions, ideas := make(map[serial][]session), make(map[serial][]*idea)
	found := 0
	for n, u := range users {
		users[n], _ = s.userByEmail(strings.ToUpper(u.Email))
		for _, key := range s.logIns[u.ID] {
			session, _, _ := s.session(key)
			sessions[u.ID] = append(sessions[u.ID], session)
		}
		ideas[u.ID] = pages(s, u.ID)
		for _, i := range ideas[u.ID] {
			if same, err := s.idea(u.ID, i.ID); err == nil && bytes.Equal(same.json, i.json) {
				found++
			}
		}
		found += len(sessions[u.ID])
	}
	if found != len(s.sessions)+len(s.ideas) || len(s.users) != len(s.emails) {
		return "the indexes do not agree"
	}
	return describe(users, sessions, ideas)
}

func pages(s *store, owner serial) (all []*idea) {
	for page := 1; ; page++ {
		ideas, total := listed(s, owner, page)
		if all = append(all, ideas...); page*pageSize >= total {
			return all
		}
	}
}

func listed(s *store, owner serial, page int) (ideas []*idea, total int) {
	list, total := s.pageOfIdeas(owner, page)
	var elements []json.RawMessage
	err := json.Unmarshal(list, &elements)
	for _, element := range elements {
		i := &idea{json: element}
		err = errors.Join(err, json.Unmarshal(element, i))
		ideas = append(ideas, i)
	}
	if err != nil {
		panic(err)
	}
	return ideas, total
}

func describe(users []user, sessions map[serial][]session, ideas map[serial][]*idea) string {
	slices.SortFunc(users, func(a, b user) int { return cmp.Compare(a.ID, b.ID) })
	var text strings.Builder
	for _, u := range users {
		fmt.Fprintln(&text, "user", u.ID, u.Email, u.Name, u.Password)
		for _, s := range sessions[u.ID] {
			fmt.Fprintln(&text, "  session", s)
		}
		for _, i := range ideas[u.ID] {
			fmt.Fprintf(&text, "  idea %s\n", i.json)
		}
	}
	return text.String()
}

// compare shows the first lines that differ.
func compare(t testing.TB, name, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	n := 0
	for n < min(len(g), len(w))-1 && g[n] == w[n] {
		n++
	}
	t.Errorf("%s: line %d of the contents is\n%s\nwant\n%s", name, n+1, g[n], w[n])
}

// Stores:

// An audited store has a ledger beside it.
type audited struct {
	*store
	ledger
	t       testing.TB
	scratch string
}

// audit starts a store in a new folder.
func audit(t testing.TB, disk disk) *audited {
	t.Helper()
	return &audited{store: mustStart(t, scratch(t), disk), t: t, scratch: scratch(t)}
}

// must makes a change and notes it.
func (a *audited) must(c change) {
	a.t.Helper()
	if err := a.commit(c); err != nil {
		a.t.Fatalf("%s: %v", inJSON(c), err)
	}
	a.ledger.do(c)
}

// performAtOnce makes changes at the same time. In one line, it keeps the disk
// until all are in the queue, in this order.
func (a *audited) performAtOnce(inOneLine bool, changes ...change) []error {
	errs := make([]error, len(changes))
	if !inOneLine {
		atOnce(len(changes), func(n int) { errs[n] = a.commit(changes[n]) })
		return errs
	}
	queued := func() int {
		a.queueMu.Lock()
		defer a.queueMu.Unlock()
		return len(a.queue)
	}
	var wg sync.WaitGroup
	a.diskMu.Lock()
	for n, c := range changes {
		wg.Go(func() { errs[n] = a.commit(c) })
		for queued() <= n {
			runtime.Gosched()
		}
	}
	a.diskMu.Unlock()
	wg.Wait()
	return errs
}

func (a *audited) agrees(when string) {
	a.t.Helper()
	compare(a.t, when, contents(a.store), a.ledger.String())
}

// survivesAKill looks also what a new store would make of the files.
func (a *audited) survivesAKill(when string) {
	a.t.Helper()
	a.agrees(when)
	compare(a.t, when+", then a kill", readFiles(a.t, a.path).read(a.t, a.scratch), a.ledger.String())
}

func (a *audited) restart() {
	a.t.Helper()
	if err := a.close(); err != nil {
		a.t.Fatal(err)
	}
	a.store = mustStart(a.t, a.path, a.disk)
}

// mustOpen opens a store that is abandoned at the end of the test.
func mustOpen(t testing.TB, path string) *store {
	t.Helper()
	s, err := openStore(path, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abandon(s) })
	return s
}

// abandon leaves the files as they are, as the end of a process would.
func abandon(s *store) {
	if s.lock.Close() != nil {
		return // it is closed
	}
	s.renewing.Lock() // and nobody else from now on
	s.journal.Close()
}

func mustStart(t testing.TB, path string, disk disk) *store {
	t.Helper()
	s := mustOpen(t, path)
	s.disk = disk
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	return s
}

var quiet = slog.New(slog.DiscardHandler)

// atOnce runs n goroutines, and waits for them.
func atOnce(n int, do func(n int)) {
	var wg sync.WaitGroup
	for n := range n {
		wg.Go(func() { do(n) })
	}
	wg.Wait()
}

// settle waits for the renew that goes on beside.
func settle(s *store) {
	s.renewing.Lock()
	defer s.renewing.Unlock()
}

// noSync spares the tests that are not about it the time of an fsync.
func noSync(op, _ string, do func() error) error {
	if op == "sync" {
		return nil
	}
	return do()
}

// weigh adds up the bytes of all writes.
func weigh(written *atomic.Int64) disk {
	return func(op, path string, do func() error) error {
		if op != "write" {
			return do()
		}
		before, _ := os.Stat(path)
		err := do()
		after, _ := os.Stat(path)
		written.Add(after.Size() - before.Size())
		return err
	}
}

// halfWrite is a write that ends as the disk is full.
func halfWrite(path string, do func() error) error {
	before, _ := os.Stat(path)
	if err := do(); err != nil {
		return err
	}
	after, _ := os.Stat(path)
	os.Truncate(path, (before.Size()+after.Size())/2)
	return syscall.ENOSPC
}

// chain returns the files of a store that was killed while it compacted, so
// that two journals continue FILE, and what there was before them and after
// each of their lines.
func chain(t *testing.T) (left files, states []string) {
	var fail atomic.Bool
	a := audit(t, func(op, path string, do func() error) error {
		if op == "rename" && fail.Load() {
			return errInjected
		}
		return noSync(op, path, do)
	})
	ann, bob := somebody(1), somebody(2)
	a.must(ann.signsUp("a@example.org"))
	a.must(bob.signsUp("b@example.org"))
	a.must(ann.creates(ideaID(1), "tea", 5))
	a.must(bob.creates(ideaID(2), "rain", 6))
	err := a.start()
	for _, line := range [][]change{
		{},
		{ann.creates(ideaID(3), "scones", 7)},
		{bob.logsIn("key", 10), ann.deletes(ideaID(3))},
		{bob.updates(ideaID(2), "snow", 8)},
	} {
		a.performAtOnce(true, line...)
		states = append(states, contents(a.store))
	}
	fail.Store(true)
	if failed := a.start(); err != nil || failed == nil {
		t.Fatal(err, failed)
	}
	a.must(bob.deletes(ideaID(2)))
	return readFiles(t, a.path), append(states, contents(a.store))
}

// short is a chain with one journal.
func short(t *testing.T) (left files, lines, states []string) {
	left, states = chain(t)
	delete(left, journal3)
	return left, slices.Collect(strings.Lines(left[journal2])), states
}

// scratch is the path of a FILE in a folder of its own.
func scratch(t testing.TB) string { return filepath.Join(t.TempDir(), snapshotName) }

// files are FILE and its journals, by name.
type files map[string]string

const (
	snapshotName = "pool.json"
	journal2     = snapshotName + ".journal.00000002"
	journal3     = snapshotName + ".journal.00000003"
)

func readFiles(t testing.TB, path string) files {
	t.Helper()
	f := make(files)
	paths, _ := filepath.Glob(filepath.Join(filepath.Dir(path), snapshotName+"*"))
	for _, path := range paths {
		if filepath.Ext(path) == ".lock" {
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		f[filepath.Base(path)] = string(data)
	}
	return f
}

// write makes a folder hold these files. It writes over what is there, as to
// make a file takes 25 times as long.
func (f files) write(t testing.TB, path string) {
	t.Helper()
	for name := range readFiles(t, path) {
		if _, ok := f[name]; !ok {
			os.Remove(filepath.Join(filepath.Dir(path), name))
		}
	}
	for name, data := range f {
		file, err := os.OpenFile(filepath.Join(filepath.Dir(path), name), os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			_, err = file.WriteString(data)
			err = errors.Join(err, file.Truncate(int64(len(data))), file.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// read returns what a store makes of the files, at a path.
func (f files) read(t testing.TB, path string) string {
	t.Helper()
	f.write(t, path)
	s, err := openStore(path, quiet)
	if err != nil {
		return err.Error()
	}
	defer s.lock.Close()
	return contents(s)
}

// refused reports a store that opens, or an error without a text, or a change
// of the files.
func (f files) refused(t *testing.T, path, name, text string) {
	t.Helper()
	f.write(t, path)
	s, err := openStore(path, quiet)
	if err == nil {
		s.lock.Close()
		t.Errorf("%s: is accepted", name)
	} else if !strings.Contains(err.Error(), text) {
		t.Errorf("%s: error %q is without %q", name, err, text)
	}
	if !maps.Equal(readFiles(t, path), f) {
		t.Errorf("%s: the files were changed", name)
	}
}

// edit is what somebody does by hand who knows that crc32c must go.
func (f files) edit(old, new string) {
	text := strings.Replace(f[snapshotName], old, new, 1)
	f[snapshotName] = regexp.MustCompile(`,\n"crc32c":"\w+"`).ReplaceAllString(text, "")
}

// A platter is what a disk holds of a folder. What is not fsynced it may lose:
// the bytes of a file, and the coming and going of names.
type platter struct {
	mu            sync.Mutex
	live, durable map[string]*platterFile
	before        func(op string) // called before each operation
}

type platterFile struct{ synced, written string }

func newPlatter(f files) *platter {
	p := &platter{live: make(map[string]*platterFile), before: func(string) {}}
	for name, data := range f {
		p.live[name] = &platterFile{data, data}
	}
	p.durable = maps.Clone(p.live)
	return p
}

func (p *platter) step(op, path string, do func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := filepath.Base(path)
	p.before(op + " " + name)
	if err := noSync(op, path, do); err != nil {
		return err
	}
	switch {
	case op == "create" && p.live[name] == nil:
		p.live[name] = new(platterFile)
	case op == "rename":
		p.live[name] = p.live[name+".tmp"]
		delete(p.live, name+".tmp")
	case op == "remove":
		delete(p.live, name)
	case op == "sync" && p.live[name] == nil: // the folder
		p.durable = maps.Clone(p.live)
	}
	f := p.live[name]
	if f == nil {
		return nil
	}
	data, err := os.ReadFile(path)
	f.written = string(data)
	if op == "sync" {
		f.synced = f.written
	}
	return err
}

// left is what is left if of each file as much is kept.
func left(names map[string]*platterFile, keep func(synced, written string) string) files {
	f := make(files)
	for name, file := range names {
		f[name] = keep(file.synced, file.written)
	}
	return f
}

// Other processes:

const serveEnv = "IDEAPOOL_TEST_SERVE"

// TestMain lets the test binary be the server, for the tests that kill it, and
// the client of the benchmarks.
func TestMain(m *testing.M) {
	if os.Getenv(serveEnv) != "" {
		main()
		os.Exit(0)
	}
	if config := os.Getenv(loadEnv); config != "" {
		var l load
		json.Unmarshal([]byte(config), &l)
		l.run()
	}
	os.Exit(m.Run())
}

// A child is the server in a process of its own.
type child struct {
	*exec.Cmd
	stderr string // a file
}

func startChild(t *testing.T, path string) *child {
	t.Helper()
	stderr, err := os.CreateTemp(t.TempDir(), "stderr")
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	key := filepath.Join(filepath.Dir(path), "key.pem")
	c := &child{exec.Command(os.Args[0], "-quiet", "-addr", "127.0.0.1:0", "-data", path, "-key", key), stderr.Name()}
	c.Env = append(os.Environ(), serveEnv+"=1")
	c.Stderr = stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	return c
}

func (c *child) said() string {
	data, _ := os.ReadFile(c.stderr)
	return string(data)
}

func (c *child) kill() {
	c.Process.Kill() // fails if it has exited
	c.Wait()
}

// url waits until the child serves.
func (c *child) url(t *testing.T) string {
	address := regexp.MustCompile(`Idea Pool is at (\S+)\n`)
	for range 10_000 {
		if found := address.FindStringSubmatch(c.said()); found != nil {
			return found[1]
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("has not started: %s", c.said())
	return ""
}

// underLoad has everybody at work until, after so many acknowledged writes,
// the server is sent a signal. It returns how many there were at last.
func (c *child) underLoad(t *testing.T, all []*visitor, writes int, end os.Signal) int {
	var acknowledged atomic.Int64
	url := c.url(t)
	atOnce(len(all), func(n int) {
		for all[n].change(t, url) {
			if acknowledged.Add(1) == int64(writes) {
				time.AfterFunc(rand.N(3*time.Millisecond), func() { c.Process.Signal(end) })
			}
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	c.Wait() // how it ended is in its ProcessState
	return int(acknowledged.Load())
}

// A visitor is a client who remembers what was answered.
type visitor struct {
	user     user
	newcomer bool // signs up and logs in only; a hash takes its time
	count    int  // of all that was asked
	jwt      string
	tokens   []string          // refresh tokens that are good
	ended    []string          // and those that are not any more
	ideas    map[string]string // by id, as they were answered
	open     *request          // what was not answered
}

// A request is to change an idea.
type request struct {
	id   string // empty for a new one
	sent string // empty for a deletion
}

// crowd makes 16 visitors, and the files of a store that knows them, so that
// no hashes need to be computed first.
func crowd(t *testing.T) (path string, all []*visitor) {
	a := audit(t, noSync)
	for n := range 16 {
		u := user{ID: a.newID(), Email: fmt.Sprintf("%d@example.org", n), Name: "V", Password: noPassword}
		v := &visitor{user: u, newcomer: n == 0, ideas: make(map[string]string)}
		for range maxSessions {
			token, now := fmt.Sprintf("%d-%d", n, len(v.tokens)), time.Now()
			c := change{Session: &session{Key: keyOf(token), UserID: u.ID, Start: now.Unix(), Expires: now.Add(time.Hour).Unix()}}
			if len(v.tokens) == 0 {
				c.User = &u
			}
			a.must(c)
			v.tokens = append(v.tokens, token)
		}
		all = append(all, v)
	}
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	return a.path, all
}

// change makes one and notes the answer. It returns false if none came.
func (v *visitor) change(t *testing.T, url string) bool {
	v.count++
	var id string // of any idea
	for id = range v.ideas {
		break
	}
	// As long as can be, so that the store compacts in between.
	sent := fmt.Sprintf(`"content":"%d %s","impact":%d,"ease":%d,"confidence":%d`,
		v.count, strings.Repeat(`\u003c`, 240), 1+rand.IntN(10), 1+rand.IntN(10), 1+rand.IntN(10))
	var answer string
	ok := v.jwt != ""
	if !ok {
		answer, ok = v.ask(t, 200, "POST", url+"/access-tokens/refresh", `{"refresh_token":"`+v.tokens[0]+`"}`)
		v.jwt = member(answer, "jwt")
	}
	switch n := rand.IntN(20); {
	case !ok:
	case v.newcomer:
		credentials := fmt.Sprintf(`{"email":"%d.%s","name":"N","password":"the-Secret-123"}`, v.count, v.user.Email)
		for _, path := range []string{"/users", "/access-tokens"} {
			if answer, ok = v.ask(t, 201, "POST", url+path, credentials); ok {
				v.tokens = append(v.tokens, member(answer, "refresh_token"))
			}
		}
	case n == 0 && len(v.tokens) > 1:
		last := len(v.tokens) - 1
		token := v.tokens[last]
		v.tokens = v.tokens[:last]
		if _, ok = v.ask(t, 204, "DELETE", url+"/access-tokens?refresh_token="+token, ""); ok {
			v.ended, v.jwt = append(v.ended, token), ""
		}
	default:
		v.open = &request{id, sent}
		switch {
		case n < 10 || id == "":
			v.open.id = ""
			answer, ok = v.ask(t, 201, "POST", url+"/ideas", "{"+sent+"}")
		case n < 16:
			answer, ok = v.ask(t, 200, "PUT", url+"/ideas/"+id, "{"+sent+"}")
		default:
			v.open.sent = ""
			answer, ok = v.ask(t, 204, "DELETE", url+"/ideas/"+id, "")
		}
		if ok {
			delete(v.ideas, v.open.id)
			if v.open = nil; answer != "" {
				v.ideas[member(answer, "id")] = answer
			}
		}
	}
	return ok
}

// ask returns an answer if it comes, and comes whole.
func (v *visitor) ask(t *testing.T, status int, method, url, body string) (answer string, ok bool) {
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Error(err)
		return "", false
	}
	r.Header.Set("X-Access-Token", v.jwt)
	got, err := visitors.Do(r)
	if err != nil {
		return "", false
	}
	defer got.Body.Close()
	data, err := io.ReadAll(got.Body)
	if err == nil && got.StatusCode != status {
		t.Errorf("%s %s: %d, want %d: %s", method, url, got.StatusCode, status, data)
	}
	return string(data), err == nil && got.StatusCode == status
}

var visitors = http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}

// member returns one of a JSON object that is text.
func member(object, name string) string {
	var members map[string]any
	json.Unmarshal([]byte(object), &members)
	text, _ := members[name].(string)
	return text
}

// checkAll compares what there is with the answers. What was not answered may
// have happened, wholly, or not.
func checkAll(t *testing.T, all []*visitor, s *store) {
	t.Helper()
	for id := range s.users {
		if len(s.logIns[id]) == 0 {
			t.Errorf("user %s is there in part: without the session of the sign-up", id)
		}
	}
	for _, v := range all {
		for _, token := range v.tokens {
			if _, _, ok := s.session(keyOf(token)); !ok {
				t.Errorf("a session of %s is lost", v.user.Email)
			}
		}
		for _, token := range v.ended {
			if _, _, ok := s.session(keyOf(token)); ok {
				t.Errorf("a session of %s has come back", v.user.Email)
			}
		}
		list := pages(s, v.user.ID)
		there := make(map[string]string)
		for _, i := range list {
			there[i.ID.String()] = string(i.json)
		}
		if !slices.IsSortedFunc(list, bestFirst) || len(there) != len(list) {
			t.Errorf("the list of %s is out of order, or has something twice", v.user.Email)
		}
		ids := slices.Concat(slices.Collect(maps.Keys(v.ideas)), slices.Collect(maps.Keys(there)))
		for _, id := range ids {
			was, is, open := v.ideas[id], there[id], v.open
			switch {
			case is == was:
			case open != nil && (open.id == id || open.id == "" && was == "") &&
				(open.sent == "") == (is == "") && strings.Contains(is, open.sent):
				v.ideas[id] = is
				v.open = nil // it happened, and not a second time
			default:
				t.Errorf("an idea of %s is\n%s\nwas answered as\n%s\nand then asked\n%v", v.user.Email, is, was, open)
			}
		}
		v.ideas, v.open = there, nil
	}
}
